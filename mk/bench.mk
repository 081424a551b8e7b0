# Benchmarks are commands of their own, never asserts in tests.
.PHONY: bench bench-kvm bench-io bench-io-kvm bench-net bench-net-kvm bench-hello

bench: build bundle ## Measure starts, execs and idle memory against runc in the same run (ROUNDS=10)
	@integration/devbox up
	@integration/bench --rounds $(or $(ROUNDS),10)

bench-kvm: build bundle ## The same for the KVM machine, in a host VM whose KVM works (ROUNDS=5)
	@integration/bench-kvm --rounds $(or $(ROUNDS),5)

bench-io: build bundle ## Measure a volume and the stdio path against the bare directory and runc (ROUNDS=3)
	@$(CARGO) build --release --locked -q -p vz-suite --bin vz-io
	@integration/devbox up
	@integration/bench-io --rounds $(or $(ROUNDS),3)

bench-io-kvm: build bundle ## The same for the KVM machine, in the host VM
	@$(CARGO) build --release --locked -q -p vz-suite --bin vz-io
	@integration/bench-kvm io --rounds $(or $(ROUNDS),2) --mib 16

bench-net: build bundle ## Measure networks against runc's veth: starts, iperf3, round trips (ROUNDS=5)
	@integration/devbox up
	@integration/bench-net --rounds $(or $(ROUNDS),5)

bench-net-kvm: build bundle ## The same for the KVM machine, in the host VM
	@integration/bench-kvm net --rounds $(or $(ROUNDS),3) --seconds 2

bench-hello: bundle ## Measure the way to the agent's connection against QEMU's microvm with KVM, in the host VM (ROUNDS=5)
	@integration/bench-hello $(or $(ROUNDS),5)
