# Tests. `make test`, in the Makefile, runs all of them; integration/suite says what can be set.

SUITE_FILTER ?=

# Groups of the suite in which a guest is hostile.
BOUNDARY := endings:: escape:: hostile:: metal::

suite := $(CARGO) test --locked -q -p vz-suite --test suite --
tally := $(CARGO) run --locked -q -p vz-tally -- target/tally

.PHONY: fuzz hostile developer soak soak-files test-unit test-integration test-boundary test-release test-reproducible test-runc test-kvm test-kvm-core

# Each run's output is kept, for the sum that `make test` ends with.
test-unit: ## Unit tests of all crates; fails on a skipped test that integration/tally/skips does not have
	@rm -rf target/tally
	@rc=0; mk/tallied unit $(CARGO) test --locked -q --workspace --exclude vz-suite || rc=$$?; $(tally) unit && exit $$rc

test-integration: build bundle hostile developer ## Integration tests: real containerd, real guests; needs root (SUITE_FILTER='events:: crash::' runs some)
	@mk/tallied suite-lib $(CARGO) test --locked -q -p vz-suite --lib
	@mk/tallied suite $(suite) $(SUITE_FILTER)

test-boundary: build bundle hostile ## What hostile guests do to the host: a table of scenes, what came of each, what it cost the host; part of test-integration
	@$(suite) $(BOUNDARY)

test-release: release ## That the release's programs alone are a whole installation: no guest bundle on the machine; needs root
	@integration/one-file

test-reproducible: bundle ## That building the guest bundle again gives the same bytes; VZ_TEST_KERNEL=1: its kernel and youki too
	@mk/bundle/reproduce '$(KERNEL_PROFILE)' '$(bundle_dir)'

test-runc: ## The same tests against runc, which tells a wrong test from a wrong shim
	@VZ_TEST_RUNTIME=io.containerd.runc.v2 $(suite) $(SUITE_FILTER)

test-kvm: build bundle hostile ## The same tests on the KVM machine, in a host VM whose KVM works (SUITE_FILTER as above; all: over an hour)
	@integration/suite-kvm $(SUITE_FILTER)

test-kvm-core: build bundle hostile ## Of these the core that CI runs; says which tests are left out
	@integration/suite-kvm core

hostile: bundle ## Make out/hostile and out/metal for the tests: an init that lies to the host, and a guest that speaks raw virtio
	@mk/bundle/hostile
	@mk/bundle/metal

# Twenty processor minutes go into the developer's kernel: its configuration is checked here in any case, but its bundle is only made, and tested,
# where that kernel is cached. Elsewhere the test is skipped, and says so; `make bundle KERNEL_PROFILE=developer` caches it.
developer:
	@$(MAKE) --no-print-directory check-kernel KERNEL_PROFILE=developer
	@entry=$$($(for_guest) $(bundle_root)/kernel/build --config developer) && \
		if [ -e "$$entry/vmlinux" ]; then $(MAKE) --no-print-directory bundle KERNEL_PROFILE=developer; fi

soak: build bundle ## Use one container for long, and print what its shim takes (SOAK_OPTIONS='--execs 1000 --minutes 1'; see --help)
	@integration/devbox up
	@integration/soak $(SOAK_OPTIONS)

soak-files: build bundle ## Two VMs write one SQLite database, git repository and PostgreSQL server, for an hour (SOAK_OPTIONS='--minutes 5')
	@integration/soak-files $(SOAK_OPTIONS)

fuzz: ## Fuzz everything that parses what a guest says (FUZZ_SECONDS=60 for each target, FUZZ_TARGETS='net blk' for some)
	@mk/fuzz $(FUZZ_TARGETS)
