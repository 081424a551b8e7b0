# Benchmarks are commands of their own, never asserts in tests.
.PHONY: bench bench-kvm bench-io bench-io-kvm bench-net bench-net-kvm bench-hello bench-launch bench-boot bench-boot-kvm

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

bench-launch: bundle ## Measure what the host does before a guest's first instruction on the KVM machine, on this machine itself (ROUNDS=20)
	@integration/bench-launch $(or $(ROUNDS),20)

bench-boot: bundle ## Measure the guest bundle's boot by phases, with a drawing in out/boot.svg (BENCH_OPTIONS='--instructions'; see --help)
	@$(CARGO) build --release --locked -q -p vz-bench
	@target/release/vz-linux-bench --bundle-dir '$(bundle_dir)' --plot '$(OUT)/boot.svg' $(BENCH_OPTIONS)

bench-boot-kvm: bundle ## The same on the KVM machine, in the host VM (BENCH_OPTIONS as above)
	@$(CARGO) build --release --locked -q -p vz-bench
	@integration/hostvm -i -t 600 target/release/vz-linux-bench --bundle-dir '$(bundle_dir)' --machine kvm --iterations 5 $(BENCH_OPTIONS)
