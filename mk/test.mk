# Tests. `make test`, in the Makefile, runs all of them; integration/suite says what can be set.

SUITE_FILTER ?=

# Groups of the suite in which a guest is hostile.
BOUNDARY := endings:: escape:: hostile:: metal::

suite := $(CARGO) test --locked -q -p vz-suite --test suite --
tally := $(CARGO) run --locked -q -p vz-tally -- target/tally

.PHONY: fuzz hostile developer soak soak-files test-unit test-one test-integration test-boundary test-release
.PHONY: test-reproducible test-runc test-kvm test-kvm-core

##@ Tests

# Each run's output is kept, for the sum that `make test` ends with.
test-unit: ## Unit tests of all crates; fails on a skipped test that integration/tally/skips does not have
	@rm -rf target/tally
	@rc=0; mk/tallied unit $(CARGO) test --locked -q --workspace --exclude vz-suite || rc=$$?; \
		$(tally) unit && exit $$rc

test-one: ## One integration test by its name, needs root (T=run::exit_codes_reach_the_client)
test-one: build bundle hostile
	@mk/test-one '$(T)'

test-integration: ## Integration tests with real containerd and guests, needs root (SUITE_FILTER='events:: crash::')
test-integration: build bundle hostile developer
	@integration/devbox tools --cri >/dev/null || echo 'note: crictl cannot be built: the tests of pods are skipped'
	@mk/tallied suite-lib $(CARGO) test --locked -q -p vz-suite --lib
	@mk/tallied suite $(suite) $(SUITE_FILTER)

test-boundary: ## What hostile guests do to the host: the groups endings, escape, hostile and metal, with a table
test-boundary: build bundle hostile
	@$(suite) $(BOUNDARY)

test-release: ## Show that a release's programs alone are a whole installation; needs root
test-release: release
	@integration/one-file

test-reproducible: ## Build the guest bundle again and compare its bytes (VZ_TEST_KERNEL=1: kernel and youki too)
test-reproducible: bundle
	@mk/bundle/reproduce '$(KERNEL_PROFILE)' '$(bundle_dir)'

test-runc: ## Integration tests with runc, which tells a wrong test from a wrong shim (SUITE_FILTER)
	@VZ_TEST_RUNTIME=io.containerd.runc.v2 $(suite) $(SUITE_FILTER)

test-kvm: ## Integration tests on the KVM machine, in a host VM whose KVM works; over an hour (SUITE_FILTER)
test-kvm: build bundle hostile
	@integration/suite/kvm $(SUITE_FILTER)

test-kvm-core: ## The integration tests that CI runs on the KVM machine; says which are left out
test-kvm-core: build bundle hostile
	@integration/suite/kvm core

hostile: ## Make the tests' guests out/hostile, an init that lies, and out/metal, which speaks raw virtio
hostile: bundle
	@mk/bundle/hostile
	@mk/bundle/metal

# Twenty processor minutes go into the developer's kernel. Its configuration is checked here in any case. Its bundle is
# made and tested only if that kernel is cached; otherwise the test is skipped, and says so. The target bundle with
# KERNEL_PROFILE=developer caches it.
developer:
	@$(MAKE) --no-print-directory check-kernel KERNEL_PROFILE=developer
	@entry=$$($(for_guest) $(bundle_root)/kernel/build --config developer) && \
		if [ -e "$$entry/vmlinux" ]; then $(MAKE) --no-print-directory bundle KERNEL_PROFILE=developer; fi

soak: ## Use one container for long, and print the shim's memory and descriptors (SOAK_OPTIONS='--minutes 1')
soak: build bundle
	@integration/devbox up
	@integration/soak/execs $(SOAK_OPTIONS)

soak-files: ## Two VMs write one SQLite database, git repository and PostgreSQL server (SOAK_OPTIONS='--minutes 5')
soak-files: build bundle
	@integration/soak/files $(SOAK_OPTIONS)

fuzz: ## Fuzz everything that parses what a guest says (FUZZ_SECONDS=60 each, FUZZ_TARGETS='net blk')
	@mk/fuzz $(FUZZ_TARGETS)

.PHONY: test-cri
test-cri: ## CRI's conformance tests with pods of vz, needs root (MODE=shim, MODE=runc, CRI_OPTIONS=--parallel=2)
test-cri: build bundle
	@integration/cri $(or $(MODE),podsandbox) $(CRI_OPTIONS)
