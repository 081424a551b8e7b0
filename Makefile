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
completions := $(addprefix $(share)/,bash-completion/completions/vz zsh/site-functions/_vz fish/vendor_completions.d/vz.fish)

include mk/*.mk

embedded := --features containerd-shim-vz-v2/embedded,vz-cli/embedded

.PHONY: help setup build release run test lint fmt install install-bundle uninstall clean

help: ## Show this list
	@printf 'Usage: make TARGET\n\n'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "  %-18s %s\n", $$1, $$2 }'

setup: ## Install what building and testing need (Debian packages; asks for root)
	@mk/setup

build: ## Build the shim, vz and vz-linux-bench (release) into target/release
	@$(CARGO) build --release --locked -p containerd-shim-vz-v2 -p vz-cli -p vz-bench

# Without it, tests need not wait for the payload and its linking.
release: payload ## The same with the container's guest bundle in the shim and vz: one file is a complete installation
	@$(CARGO) build --release --locked -p containerd-shim-vz-v2 -p vz-cli -p vz-bench $(embedded)

run: setup build bundle ## From nothing to a container in a microVM: installs, builds, starts the devbox, runs one
	@mk/run

test: setup lint test-unit build bundle check-kernel test-integration ## Lint, unit tests and the whole integration suite; ends with what was skipped
	@$(tally)

lint: ## Check formatting, clippy, shell scripts and dependencies' licences
	@mk/lint

fmt: ## Format the code
	@$(CARGO) fmt --all

install: release ## Install the shim and vz, with the guest bundle in them, vz-linux-bench, man pages, completions, a configuration; PREFIX=/usr/local
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

install-bundle: bundle ## Install the guest bundle of KERNEL_PROFILE for everybody, in PREFIX/share/vz/linux
	install -D -m 644 -t $(share)/vz/linux/$(KERNEL_PROFILE) $$(find $(bundle_dir) -maxdepth 1 -type f)
	chmod 755 $(share)/vz/linux/$(KERNEL_PROFILE)/youki

uninstall: ## Remove what install and install-bundle have put there; the configuration stays
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,$(notdir $(PROGRAMS)))
	rm -f $(completions) $(share)/man/man1/vz.1 $(share)/man/man1/vz-*.1
	rm -rf $(share)/vz
	# What the installed programs have unpacked.
	[ -n '$(DESTDIR)' ] || rm -rf /var/lib/vz/linux

clean: ## Delete what was built here; caches outside stay
	rm -rf target out
