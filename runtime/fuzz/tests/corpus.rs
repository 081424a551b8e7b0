//! Runs the committed corpus: a regression of what the fuzzer found worth keeping, and of every bug that it found.

use std::{fs, path::Path};

fn replay(name: &str) {
    let target = vz_fuzz::target(name).unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut inputs: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!inputs.is_empty(), "{} is empty", dir.display());
    inputs.sort();
    for input in inputs {
        println!("{}", input.display());
        if let Err(why) = target(&fs::read(&input).unwrap()) {
            vz_tally::skip!("{why}");
            return;
        }
    }
}

/// One test for each target, so that a failure names it and each has a thread of its own.
macro_rules! targets {
    ($($name:ident),*) => {
        $(
            #[test]
            fn $name() {
                replay(stringify!($name));
            }
        )*

        #[test]
        fn no_target_is_left_out() {
            let names: Vec<_> = vz_fuzz::TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
        }
    };
}

targets!(answers, balloon, blk, console, fs, mmio, net, proto, rng, vsock);
