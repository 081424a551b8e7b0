# The guest bundles: {vmlinux,initramfs.img,youki,version.json}. The profile container has out/container,
# developer has out itself.
#
# A script makes each part and knows whether its result is there: kernel and youki by the hash of all that decides
# them, in ~/.cache/vz; the agent by cargo. So the rules below always run the scripts. A run without changes takes about
# a second.

KERNEL_PROFILE ?= container
YOUKI_VERSION ?= 0.7.0
# A ready-made static /init to pack instead of building vz-agent.
AGENT ?=
# Whose processor: x86_64 or arm64, this machine's if not set.
ARCH ?=

bundle_root := $(patsubst %/,%,$(dir $(lastword $(MAKEFILE_LIST))))/..
bundle_scripts := $(bundle_root)/mk/bundle
# Another architecture's bundles are beside those of this machine.
host_arch := $(subst aarch64,arm64,$(shell uname -m))
guest_arch := $(subst amd64,x86_64,$(subst aarch64,arm64,$(or $(ARCH),$(host_arch))))
OUT ?= out$(if $(filter-out $(host_arch),$(guest_arch)),/$(guest_arch))
# Make would hand it to cargo's builds of the host's programs too.
unexport ARCH
for_guest := ARCH='$(guest_arch)'

# What each profile is. Another profile is other kernel fragments and two lines here.
security_profile_container := constrained
bundle_dir_container = $(OUT)/container
security_profile_developer := broad
bundle_dir_developer = $(OUT)
no_profile = KERNEL_PROFILE=$(KERNEL_PROFILE) does not exist: there are container and developer
security_profile = $(or $(security_profile_$(KERNEL_PROFILE)),$(error $(no_profile)))
bundle_dir = $(bundle_dir_$(KERNEL_PROFILE))

.PHONY: bundle check-bundle kernel check-kernel agent youki payload check-payload

##@ Guest bundle

bundle: ## Build a guest bundle: kernel, initramfs, youki, version.json (KERNEL_PROFILE; cold: about 15 min)
	@$(for_guest) $(bundle_scripts)/make '$(KERNEL_PROFILE)' '$(security_profile)' '$(bundle_dir)' \
		'$(YOUKI_VERSION)' '$(AGENT)'

check-bundle: ## Check the built bundle: checksums, PVH note, static programs, same initramfs, bill of materials
check-bundle: bundle
	@$(bundle_scripts)/check '$(bundle_dir)'

# Always the container's, and this machine's.
payload: ## Compress the container's bundle for the release's programs and the crate vz-kernel
	@$(MAKE) --no-print-directory bundle KERNEL_PROFILE=container OUT=$(OUT)
	@$(bundle_scripts)/payload '$(OUT)/container' '$(bundle_root)/runtime/payload/$(subst _,-,$(host_arch))/payload'

check-payload: ## Check the payload: same files, installed by many processes at once, a package below 10 MiB
check-payload: payload
	@$(bundle_scripts)/check-payload

kernel: ## Build the guest kernel into the cache and print where it is
	@: '$(security_profile)'
	@$(for_guest) $(bundle_root)/kernel/build '$(KERNEL_PROFILE)'

check-kernel: ## Check the resolved kernel configuration: what must be in it, what must not
	@: '$(security_profile)'
	@entry=$$($(for_guest) $(bundle_root)/kernel/build --config '$(KERNEL_PROFILE)') && \
		$(bundle_root)/kernel/check-config '$(KERNEL_PROFILE)' '$(guest_arch)' \
		"$$entry/config" "$$entry/options"

agent: ## Build the static guest agent and print where it is
	@$(for_guest) $(bundle_scripts)/agent

youki: ## Build the static youki program into the cache and print where it is
	@$(for_guest) $(bundle_scripts)/youki '$(YOUKI_VERSION)'
