# Benchmarks are commands of their own, never asserts in tests.
.PHONY: bench bench-kvm

bench: build bundle ## Measure starts, execs and idle memory against runc in the same run (ROUNDS=10)
	@integration/devbox up
	@integration/bench --rounds $(or $(ROUNDS),10)

bench-kvm: build bundle ## The same for the KVM machine, in a host VM whose KVM works, with QEMU on KVM beside it (ROUNDS=5)
	@integration/bench-kvm --rounds $(or $(ROUNDS),5)
