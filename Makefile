# vz: run `make help`. Parts with targets of their own are in mk/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
SHIM := target/release/containerd-shim-vz-v2

include mk/*.mk

.PHONY: help setup build run test lint fmt install uninstall clean

help: ## Show this list
	@printf 'Usage: make TARGET\n\n'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "  %-18s %s\n", $$1, $$2 }'

setup: ## Install what building and testing need (Debian packages; asks for root)
	@mk/setup

build: ## Build the shim (release) into target/release
	@$(CARGO) build --release --locked -p containerd-shim-vz-v2

run: setup build bundle ## From nothing to a container in a microVM: installs, builds, starts the devbox, runs one
	@mk/run

test: setup lint test-unit build bundle check-kernel test-integration ## Lint, unit tests and the whole integration suite

lint: ## Check formatting, clippy, shell scripts and dependencies' licences
	@mk/lint

fmt: ## Format the code
	@$(CARGO) fmt --all

install: build bundle ## Install the shim, its configuration and the guest bundle below PREFIX (/usr/local)
	install -D -m 755 $(SHIM) $(DESTDIR)$(PREFIX)/bin/containerd-shim-vz-v2
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/vz/linux/container out/container/*
	[ -e $(DESTDIR)/etc/vz/config.toml ] || install -D -m 644 config/vz.toml $(DESTDIR)/etc/vz/config.toml

uninstall: ## Remove what install has put there; the configuration stays
	rm -f $(DESTDIR)$(PREFIX)/bin/containerd-shim-vz-v2
	rm -rf $(DESTDIR)$(PREFIX)/share/vz

clean: ## Delete what was built here; caches outside stay
	rm -rf target out
