# Which kernel the guest bundle is built from. Part of the kernel cache's key: a change here builds anew.
#
# KERNEL_SERIES   names Debian's source package, linux-source-$(KERNEL_SERIES). Whatever version of it is installed is built (its exact
#                 version is part of the key too), so that Debian's security updates reach the guest by an upgrade and `make bundle`.
# KERNEL_VERSION  is the version that the fragment was last tuned and tested with; building another one says so.
# KERNEL_CACHE_SCHEMA  is raised when the layout of a cache entry changes.
KERNEL_SERIES := 6.12
KERNEL_VERSION := 6.12.117
KERNEL_CACHE_SCHEMA := 1
