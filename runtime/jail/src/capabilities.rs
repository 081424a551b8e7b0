//! Capabilities of the process and of its threads.

use caps::{CapSet, Capability, CapsHashSet};

use crate::{Error, Role};

/// What serving files needs: acting as the guest's users on files of all of them. Nothing here reaches beyond files.
///
/// virtiofsd's own list, with its `DAC_READ_SEARCH` left out: handles of files are not used.
const FILES: [Capability; 8] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
];

/// What the first thread needs to end QEMU, which runs as another user; it can signal only what it has a pidfd of.
const MAIN: [Capability; 1] = [Capability::CAP_KILL];

/// Leaves the calling thread, and those that it starts, what any role needs, as far as it has that; no program that it
/// could execute would get anything.
pub(crate) fn keep_any() -> Result<(), Error> {
    clear_bounding()?;
    keep_of(&[FILES.as_slice(), &MAIN].concat())
}

/// Leaves the calling thread what its role needs.
pub(crate) fn keep(role: Role) -> Result<(), Error> {
    match role {
        Role::Main => keep_of(&MAIN),
        Role::Fs => keep_of(&FILES),
        _ => keep_of(&[]),
    }
}

/// Takes care that no program that is executed gets capabilities.
pub(crate) fn clear_bounding() -> Result<(), Error> {
    let failed = |operation| move |source| Error::Capabilities { operation, source };
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(failed("read capabilities"))? {
        for capability in caps::runtime::thread_all_supported() {
            caps::drop(None, CapSet::Bounding, capability).map_err(failed("drop bounding set"))?;
        }
    }
    Ok(())
}

fn keep_of(wanted: &[Capability]) -> Result<(), Error> {
    let failed = |operation| move |source| Error::Capabilities { operation, source };
    let had = caps::read(None, CapSet::Permitted).map_err(failed("read capabilities"))?;
    set(&wanted.iter().copied().filter(|capability| had.contains(capability)).collect())
}

fn set(wanted: &CapsHashSet) -> Result<(), Error> {
    let failed = |operation| move |source| Error::Capabilities { operation, source };
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new()).map_err(failed("clear inheritable capabilities"))?;
    caps::set(None, CapSet::Effective, wanted).map_err(failed("drop effective capabilities"))?;
    caps::set(None, CapSet::Permitted, wanted).map_err(failed("drop permitted capabilities"))
}
