//! Generates the messages from `proto/cri.proto`.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto/cri.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/cri.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generated file begins with inner attributes, which an `include!` of it would not allow: a module beside the
    // included file may have them.
    fs::write(out.join("messages.rs"), "pub mod cri;\n")?;
    Ok(())
}
