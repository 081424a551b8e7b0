//! `vz vm linux`: guest bundles, installed, verified and refused by name; and containers on a bundle that was so
//! installed.

use std::fs;

use serde_json::Value;
use vz_suite::{Lab, Skip, Verdict, lab::BUSYBOX, tests};

tests![
    a_bundle_is_installed_verified_and_used,
    a_broken_bundle_is_refused_by_name,
    what_is_not_there_is_said,
    the_container_profile_refuses_what_it_must_not_have,
    the_developer_profile_has_what_it_is_for,
];

const CONTAINER: [&str; 2] = ["--kernel-profile", "container"];

#[track_caller]
fn vz(lab: &Lab, verb: &[&str], more: &[&str]) -> vz_suite::command::Output {
    lab.vz(&["vm", "linux"]).args(verb).args(more).run()
}

fn a_bundle_is_installed_verified_and_used(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let (base, from) = (dir.path().display().to_string(), lab.bundle().display().to_string());
    let place = [&CONTAINER[..], &["--dir", &base]].concat();
    let text = vz(lab, &["init", "--from", &from, "--json"], &place).ok();
    let made: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(made["dir"], format!("{base}/container"));
    let again = vz(lab, &["init", "--from", &from], &place).ok();
    assert!(again.contains("profile container"), "{again}");
    vz(lab, &["init"], &place).ok();
    assert!(vz(lab, &["verify"], &place).ok().contains("verified"));
    let info: Value = serde_json::from_str(&vz(lab, &["info", "--json"], &place).ok()).expect("info is JSON");
    assert_eq!(info["version"]["kernel_version"], made["version"]["kernel_version"]);
    let list: Value =
        serde_json::from_str(&vz(lab, &["list", "--json", "--dir", &base], &[]).ok()).expect("a list is JSON");
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list:#}");
    assert_eq!((&list[0]["used"], &list[0]["problem"]), (&Value::from(true), &Value::Null));
    // The shim takes a directory of profiles, too.
    let _guard = lab.use_bundle(dir.path());
    let seen = lab.ctr_run(&["--rm", BUSYBOX, &lab.id("bundle"), "uname", "-r"]).run().ok();
    assert_eq!(Value::from(seen), made["version"]["kernel_version"]);
    Ok(())
}

fn a_broken_bundle_is_refused_by_name(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let (base, from) = (dir.path().display().to_string(), lab.bundle().display().to_string());
    let place = [&CONTAINER[..], &["--dir", &base]].concat();
    vz(lab, &["init", "--from", &from], &place).ok();
    for name in ["vmlinux", "initramfs.img", "youki"] {
        let path = dir.path().join("container").join(name);
        let good = fs::read(&path).expect("read an artifact");
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        fs::write(&path, bad).expect("write an artifact");
        vz(lab, &["verify"], &place).exits(1).fails_with(&[name, "sha256"]);
        let list = vz(lab, &["list", "--dir", &base], &[]).ok();
        assert!(list.contains(name), "{list}");
        fs::write(&path, good).expect("write an artifact");
    }
    vz(lab, &["verify"], &place).ok();
    Ok(())
}

fn what_is_not_there_is_said(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let base = dir.path().display().to_string();
    vz(lab, &["init", "--dir", &base], &[]).exits(1).fails_with(&["no guest bundle of profile developer", "--from"]);
    for verb in ["verify", "info"] {
        let advice = ["no guest bundle of profile container", "--kernel-profile container --dir", "guest.bundle"];
        vz(lab, &[verb, "--dir", &base], &CONTAINER).exits(1).fails_with(&advice);
    }
    vz(lab, &["build", "--source", &base], &CONTAINER).exits(1).fails_with(&["mk/bundle.mk", "--source"]);
    vz(lab, &["init", "--kernel-profile", "broad"], &[]).exits(2).fails_with(&["developer", "container"]);
    Ok(())
}

/// Prints, in a guest, what its kernel has of what only the developer's has: one word a line.
const LOOK: &str = r#"
[ -e /proc/config.gz ] && echo config.gz
for name in kvm tun btrfs-control device-mapper vhost-net; do grep -qw "$name" /proc/misc && echo "$name"; done
grep -qE '(svm|vmx)' /proc/cpuinfo && echo processor
mkdir -p /run/there
for name in 9p nfs nfsd squashfs vfat btrfs xfs iso9660; do
  said=$(mount -t $name none /run/there 2>&1) && umount /run/there
  case $said in *"No such device"*) ;; *) echo "mount-$name" ;; esac
done
ip link add vzt0 type vxlan id 1 dstport 4789 2>/dev/null && echo vxlan
ip link add vzt1 type wireguard 2>/dev/null && echo wireguard
exit 0
"#;

#[track_caller]
fn look(lab: &Lab) -> Vec<String> {
    // It may do all that the guest's kernel can do.
    let may = ["--rm", "--cap-add", "ALL", "--security-opt", "seccomp=unconfined"];
    let said = lab.nerdctl_run(&may).args([BUSYBOX, "sh", "-c", LOOK]).run().ok();
    said.lines().map(str::to_owned).collect()
}

fn the_container_profile_refuses_what_it_must_not_have(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let has = look(lab);
    let others: Vec<_> = has.iter().filter(|word| *word != "processor").collect();
    assert!(others.is_empty(), "the container's kernel has {others:?}");
    Ok(())
}

fn the_developer_profile_has_what_it_is_for(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let base = lab.bundle().parent().expect("a bundle is in a directory");
    if !base.join("version.json").exists() {
        return Err(Skip("the developer's bundle is not built: run `make bundle KERNEL_PROFILE=developer`".into()));
    }
    let _bundle = lab.use_bundle(base);
    let _config = lab.configure("linux_profile = \"developer\"\n");
    let has = look(lab);
    let wanted = [
        "config.gz",
        "tun",
        "btrfs-control",
        "device-mapper",
        "vhost-net",
        "mount-9p",
        "mount-nfs",
        "mount-nfsd",
        "mount-squashfs",
        "mount-vfat",
        "mount-btrfs",
        "mount-xfs",
        "mount-iso9660",
        "vxlan",
        "wireguard",
    ];
    for word in wanted {
        assert!(has.iter().any(|had| had == word), "the developer's kernel has no {word}: {has:?}");
    }
    // KVM is there where the processor has it, which the machine on software emulation hides: it costs time at every
    // boot.
    let has = |word: &str| has.iter().any(|had| had == word);
    assert_eq!(has("kvm"), has("processor"), "/dev/kvm is there where the virtual processor has virtualization");
    // The same directory has the container's bundle in it.
    drop(lab.configure(""));
    let _bundle = lab.use_bundle(base);
    assert!(!look(lab).contains(&"config.gz".to_owned()));
    Ok(())
}
