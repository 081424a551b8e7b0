# vz: run `make help`. Parts with targets of their own are in mk/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
PROGRAMS := $(addprefix target/release/,containerd-shim-vz-v2 vz vz-linux-bench)

share := $(DESTDIR)$(PREFIX)/share
# Where each shell looks for them.
completions := $(addprefix $(share)/,bash-completion/completions/vz zsh/site-functions/_vz \
	fish/vendor_completions.d/vz.fish)

# The order in which `make help` shows the sections, which lines "##@ NAME" open.
sections := Start here|Code|Tests|Devbox|Guest bundle|Benchmarks|Installation

include mk/*.mk

embedded := --features containerd-shim-vz-v2/embedded,vz-cli/embedded

.PHONY: help setup build release run check test lint fmt install install-bundle uninstall clean

##@ Start here

help: ## Show this list
	@echo 'Usage: make TARGET [VARIABLE=VALUE]...'
	@awk -v order='$(sections)' -f mk/help.awk $(MAKEFILE_LIST)

setup: ## Install what building and testing need (Debian packages; asks for root)
	@mk/setup

run: ## From nothing to a container in a microVM: install, build, start the devbox, run one
run: setup build bundle
	@mk/run

##@ Code

build: ## Build the shim, vz and vz-linux-bench (release) into target/release
	@$(CARGO) build --release --locked -p containerd-shim-vz-v2 -p vz-cli -p vz-bench

# Without it, tests need not wait for the payload and its linking.
release: ## Build the programs with the guest bundle in them: one file is a complete installation
release: payload
	@$(CARGO) build --release --locked -p containerd-shim-vz-v2 -p vz-cli -p vz-bench $(embedded)

# The payload that clippy and the tests would embed is not needed, nor is anything else that is built before them.
check: ## Check format, text and clippy, and run the unit tests: no root, no guest bundle, minutes at most
	@mk/lint code
	@$(MAKE) --no-print-directory test-unit

lint: ## Check format, text, clippy, shell scripts, Dockerfiles, and dependencies' licences
	@mk/lint

fmt: ## Format the code
	@$(CARGO) fmt --all

clean: ## Delete what was built in this directory; caches outside stay
	rm -rf target out

##@ Tests

test: ## Lint, unit tests and the whole integration suite; ends with what was skipped
test: setup lint test-unit build bundle check-kernel test-integration
	@$(tally)

##@ Installation

install: ## Install programs, guest bundle, man pages, completions and configuration (PREFIX, DESTDIR)
install: release
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(PROGRAMS)
	# Earlier versions kept the bundle there, where it would be found before the new one.
	rm -rf $(share)/vz/linux/container
	target/release/vz man $(share)/man/man1
	target/release/vz-linux-bench --man $(share)/man/man1
	mkdir -p $(dir $(completions))
	target/release/vz completions bash >$(word 1,$(completions))
	target/release/vz completions zsh >$(word 2,$(completions))
	target/release/vz completions fish >$(word 3,$(completions))
	[ -e $(DESTDIR)/etc/vz/config.toml ] || install -D -m 644 config/vz.toml $(DESTDIR)/etc/vz/config.toml

install-bundle: ## Install the guest bundle of KERNEL_PROFILE for everybody, in PREFIX/share/vz/linux
install-bundle: bundle
	install -D -m 644 -t $(share)/vz/linux/$(KERNEL_PROFILE) $$(find $(bundle_dir) -maxdepth 1 -type f)
	chmod 755 $(share)/vz/linux/$(KERNEL_PROFILE)/youki

uninstall: ## Remove what install and install-bundle have installed; the configuration stays
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,$(notdir $(PROGRAMS)))
	rm -f $(completions) $(share)/man/man1/vz.1 $(share)/man/man1/vz-*.1
	rm -rf $(share)/vz
	# What the installed programs have unpacked.
	[ -n '$(DESTDIR)' ] || rm -rf /var/lib/vz/linux
