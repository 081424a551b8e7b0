# The guest bundle: out/<profile>/{vmlinux,initramfs.img,youki,version.json}.
#
# Each part is made by a script that knows whether its result is already there (kernel and youki by the hash of all that decides them, in
# ~/.cache/vz; the agent by cargo), so the rules below always run them, and a run without changes costs about a second.

KERNEL_PROFILE ?= container
OUT ?= out
YOUKI_VERSION ?= 0.7.0
# A ready-made static /init to pack instead of building vz-agent.
AGENT ?=

bundle_root := $(patsubst %/,%,$(dir $(lastword $(MAKEFILE_LIST))))/..
bundle_scripts := $(bundle_root)/mk/bundle

# What each profile is. Another profile is another kernel fragment and another line here.
security_profile_container := constrained
security_profile = $(or $(security_profile_$(KERNEL_PROFILE)),$(error KERNEL_PROFILE=$(KERNEL_PROFILE) cannot be built yet: only KERNEL_PROFILE=container can))

.PHONY: bundle check-bundle kernel check-kernel agent youki

bundle: ## Build the guest bundle into out/container: kernel, initramfs, youki, version.json (cold: about 15 min)
	@$(bundle_scripts)/make '$(KERNEL_PROFILE)' '$(security_profile)' '$(OUT)/$(KERNEL_PROFILE)' '$(YOUKI_VERSION)' '$(AGENT)'

check-bundle: bundle ## Check the built bundle: checksums, PVH note, static programs, reproducible initramfs
	@$(bundle_scripts)/check '$(OUT)/$(KERNEL_PROFILE)'

kernel: ## Build the guest kernel into the cache and print where it is
	@: '$(security_profile)'
	@$(bundle_root)/kernel/build '$(KERNEL_PROFILE)'

check-kernel: ## Check the resolved kernel configuration: what must be in it, what must not
	@: '$(security_profile)'
	@entry=$$($(bundle_root)/kernel/build --config '$(KERNEL_PROFILE)') && $(bundle_root)/kernel/check-config '$(KERNEL_PROFILE)' \
		"$$entry/config" '$(bundle_root)/kernel/vz-linux-$(KERNEL_PROFILE).config' "$$entry/options"

agent: ## Build the static guest agent and print where it is
	@$(bundle_scripts)/agent

youki: ## Build the static youki program into the cache and print where it is
	@$(bundle_scripts)/youki '$(YOUKI_VERSION)'
