# Benchmarks are commands of their own, never asserts in tests.
.PHONY: bench bench-kvm bench-io bench-io-kvm bench-net bench-net-kvm bench-hello bench-launch bench-boot bench-boot-kvm

##@ Benchmarks

bench: ## Starts, execs and idle memory, against runc in the same run (ROUNDS=10)
bench: build bundle
	@integration/devbox up
	@integration/bench/start --rounds $(or $(ROUNDS),10)

bench-kvm: ## Starts, execs and idle memory on the KVM machine, in a host VM whose KVM works (ROUNDS=5)
bench-kvm: build bundle
	@integration/bench/kvm --rounds $(or $(ROUNDS),5)

bench-io: ## A volume and the stdio path, against the bare directory and runc (ROUNDS=3)
bench-io: build bundle
	@$(CARGO) build --release --locked -q -p vz-suite --bin vz-io
	@integration/devbox up
	@integration/bench/io --rounds $(or $(ROUNDS),3)

bench-io-kvm: ## A volume and the stdio path on the KVM machine, in the host VM (ROUNDS=2)
bench-io-kvm: build bundle
	@$(CARGO) build --release --locked -q -p vz-suite --bin vz-io
	@integration/bench/kvm io --rounds $(or $(ROUNDS),2) --mib 16

bench-net: ## Networks: starts, iperf3 and round trips, against runc's veth (ROUNDS=5)
bench-net: build bundle
	@integration/devbox up
	@integration/bench/net --rounds $(or $(ROUNDS),5)

bench-net-kvm: ## Networks on the KVM machine, in the host VM (ROUNDS=3)
bench-net-kvm: build bundle
	@integration/bench/kvm net --rounds $(or $(ROUNDS),3) --seconds 2

bench-hello: ## From the vmm's start to the agent's connection, against QEMU's microvm with KVM (ROUNDS=5)
bench-hello: bundle
	@integration/bench/hello $(or $(ROUNDS),5)

bench-launch: ## What this host does before a guest's first instruction on the KVM machine (ROUNDS=20)
bench-launch: bundle
	@integration/bench/launch $(or $(ROUNDS),20)

bench-boot: ## The guest bundle's boot by phases, with a drawing in out/boot.svg (BENCH_OPTIONS='--instructions')
bench-boot: bundle
	@$(CARGO) build --release --locked -q -p vz-bench
	@target/release/vz-linux-bench --bundle-dir '$(bundle_dir)' --plot '$(OUT)/boot.svg' $(BENCH_OPTIONS)

bench-boot-kvm: ## The guest bundle's boot by phases on the KVM machine, in the host VM (BENCH_OPTIONS)
bench-boot-kvm: bundle
	@$(CARGO) build --release --locked -q -p vz-bench
	@integration/hostvm -i -t 600 target/release/vz-linux-bench --bundle-dir '$(bundle_dir)' --machine kvm \
		--iterations 5 $(BENCH_OPTIONS)
