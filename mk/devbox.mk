# A private containerd to try vz on: see integration/devbox, "integration/devbox help".
.PHONY: shell devbox-up devbox-down devbox-clean devbox-status

##@ Start here

shell: ## Open a shell in a new microVM (SHELL_IMAGE=vz.test/debian:12 SHELL_OPTIONS='--memory 2g')
shell: build bundle
	@mk/shell

##@ Devbox

devbox-up: ## Start a private containerd with images and a registry (first time: about 6 min)
	integration/devbox up

devbox-down: ## Remove the devbox's containers and stop it; leaves nothing but its images
	integration/devbox down

devbox-clean: ## Stop the devbox and delete its state directory
	integration/devbox clean

devbox-status: ## Say what runs in the devbox
	integration/devbox status
