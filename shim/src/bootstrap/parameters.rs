//! What containerd tells `start`, and what it is answered, in the forms of its versions.
//!
//! | containerd | stdin of `start` | reply |
//! | --- | --- | --- |
//! | 1.7 | runtime options (`Any`) | JSON, version 2 at most |
//! | 2.0 to 2.2 | runtime options | JSON, version 2 or 3 |
//! | 2.3 and later | `BootstrapParams` | `BootstrapResult` |
//!
//! Nothing tells 1.7 from 2.2, so the JSON reply says version 2, which both take; the daemon serves both versions.

use std::path::{Path, PathBuf};

use containerd_shim::Flags;
use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::{CodedInputStream, Message, rt::WireType, well_known_types::any::Any},
};

use super::error::Error;
use crate::spec;

/// Annotations that put a container into another one's sandbox, the first that is set counts.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// What `start` was told.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters {
    /// For the daemon.
    pub options: StartOptions,
    /// How containerd reads the reply.
    pub reply: ReplyForm,
}

/// The form of the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyForm {
    /// `BootstrapResult`.
    Protobuf,
    /// The older form.
    Json,
}

/// What the daemon is started with.
#[derive(Debug, Clone, PartialEq)]
pub struct StartOptions {
    /// The container.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's gRPC address.
    pub address: String,
    /// Where containerd takes events.
    pub ttrpc_address: String,
    /// Whether debug lines are wanted.
    pub debug: bool,
    /// Where the socket is to be, if containerd says so.
    pub socket_dir: Option<String>,
    /// Runtime options.
    pub extensions: Vec<Any>,
}

/// Makes one set of parameters out of what the different versions of containerd pass.
pub fn parameters(input: &[u8], flags: &Flags, ttrpc: String, grpc: String) -> Result<Parameters, Error> {
    let or = |first: String, second: String| if first.is_empty() { second } else { first };
    let legacy_address = or(flags.address.clone(), grpc);
    if let Ok(params) = BootstrapParams::parse_from_bytes(input)
        && !params.instance_id.is_empty()
    {
        if params.instance_id == flags.id && params.namespace == flags.namespace {
            let level = params.log_level.value();
            let options = StartOptions {
                id: params.instance_id,
                namespace: params.namespace,
                address: or(params.containerd_grpc_address, legacy_address),
                ttrpc_address: or(params.containerd_ttrpc_address, ttrpc),
                debug: flags.debug || (level != 0 && level <= DEBUG_LEVEL),
                socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()),
                extensions: params.extensions.into_iter().filter_map(|e| e.value.into_option()).collect(),
            };
            return Ok(Parameters { options, reply: ReplyForm::Protobuf });
        }
        // Options of the older form decode as this message too, with their type in the place of the id.
        let looks_like_any = BootstrapParams {
            instance_id: params.instance_id.clone(),
            namespace: params.namespace.clone(),
            ..Default::default()
        };
        if params != looks_like_any {
            return Err(Error::Mismatch {
                found: format!("{}/{}", params.namespace, params.instance_id),
                wanted: format!("{}/{}", flags.namespace, flags.id),
            });
        }
    }
    let extensions = Any::parse_from_bytes(input).ok().filter(|any| !any.type_url.is_empty());
    let options = StartOptions {
        id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        address: legacy_address,
        ttrpc_address: ttrpc,
        debug: flags.debug,
        socket_dir: None,
        extensions: extensions.into_iter().collect(),
    };
    Ok(Parameters { options, reply: ReplyForm::Json })
}

/// `LOG_LEVEL_DEBUG` of the bootstrap protocol; lower is more verbose, 0 is unset.
const DEBUG_LEVEL: i32 = containerd_shim_protos::bootstrap_api::LogLevel::LOG_LEVEL_DEBUG as i32;

/// Whose sandbox a container belongs to, where it is not its own.
pub fn group(bundle: &Path) -> Option<String> {
    let spec = spec::read(bundle).ok()?;
    let annotations = spec.annotations().as_ref()?;
    GROUPS.iter().find_map(|key| annotations.get(*key)).filter(|group| !group.is_empty()).cloned()
}

/// containerd's ConfigPath for this runtime, where it is set.
pub fn config_path(extensions: &[Any]) -> Option<PathBuf> {
    let any = extensions.iter().find(|any| any.type_url.ends_with("runtimeoptions.v1.Options"))?;
    // containerd's api/types/runtimeoptions/v1: `string config_path = 2`.
    let mut input = CodedInputStream::from_bytes(&any.value);
    let mut path = String::new();
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        match tag {
            CONFIG_PATH_TAG => path = input.read_string().ok()?,
            tag => input.skip_field(WireType::new(tag & 7)?).ok()?,
        }
    }
    Some(PathBuf::from(path)).filter(|path| !path.as_os_str().is_empty())
}

/// Field 2, length-delimited.
const CONFIG_PATH_TAG: u32 = 2 << 3 | 2;

/// The reply of `start`: where the sandbox's socket is.
pub fn reply(address: &str, form: ReplyForm) -> Result<Vec<u8>, Error> {
    match form {
        ReplyForm::Json => {
            Ok(serde_json::json!({ "version": 2, "address": address, "protocol": "ttrpc" }).to_string().into_bytes())
        }
        ReplyForm::Protobuf => {
            let result = BootstrapResult {
                version: 3,
                address: address.to_owned(),
                protocol: "ttrpc".into(),
                ..Default::default()
            };
            result.write_to_bytes().map_err(|source| Error::Message { what: "write bootstrap result", source })
        }
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::Extension;

    use super::*;

    fn flags() -> Flags {
        Flags { id: "c1".into(), namespace: "ns".into(), address: "/grpc".into(), ..Default::default() }
    }

    fn read(input: &[u8]) -> Result<Parameters, Error> {
        parameters(input, &flags(), "/ttrpc".into(), String::new())
    }

    #[test]
    fn nothing_on_stdin_is_the_older_form() {
        let read = read(&[]).unwrap();
        assert_eq!(read.reply, ReplyForm::Json);
        assert_eq!((read.options.address.as_str(), read.options.ttrpc_address.as_str()), ("/grpc", "/ttrpc"));
    }

    #[test]
    fn options_on_stdin_are_not_taken_for_parameters() {
        let mut any = Any::new();
        any.type_url = "runtimeoptions.v1.Options".into();
        any.value = vec![0x12, 2, b'/', b'x'];
        let read = read(&any.write_to_bytes().unwrap()).unwrap();
        assert_eq!((read.reply, read.options.extensions.len()), (ReplyForm::Json, 1));
        assert_eq!(config_path(&read.options.extensions).as_deref(), Some(Path::new("/x")));
    }

    #[test]
    fn parameters_win_over_flags_and_fall_back_to_them() {
        let mut params = BootstrapParams::new();
        params.instance_id = "c1".into();
        params.namespace = "ns".into();
        params.socket_dir = Some("/s".into());
        params.extensions.push(Extension { value: Some(Any::new()).into(), ..Default::default() });
        let read = read(&params.write_to_bytes().unwrap()).unwrap();
        assert_eq!(read.reply, ReplyForm::Protobuf);
        assert_eq!(read.options.socket_dir.as_deref(), Some("/s"));
        assert_eq!((read.options.address.as_str(), read.options.ttrpc_address.as_str()), ("/grpc", "/ttrpc"));
    }

    #[test]
    fn parameters_for_somebody_else_are_refused() {
        let mut params = BootstrapParams::new();
        params.instance_id = "c2".into();
        params.namespace = "ns".into();
        params.containerd_ttrpc_address = "/t".into();
        assert!(matches!(read(&params.write_to_bytes().unwrap()), Err(Error::Mismatch { .. })));
    }
}
