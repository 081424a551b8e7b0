# shellcheck shell=bash disable=SC2034
# What the devbox is made of. Every line of this file is part of the tools' cache key.
containerd_version=v2.3.4
nerdctl_version=v2.3.5
cni_version=v1.9.1
registry_version=v3.1.2
cri_tools_version=v1.36.0
cni_plugins=(bridge host-local loopback portmap firewall tuning)
# What containerd 2.3.4 starts for a pod's sandbox; served by the registry as well.
debian_suite=bookworm
