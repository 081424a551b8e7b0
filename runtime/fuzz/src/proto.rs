//! What the shim reads from the guest: frames, tokens, and the messages in answers.

use std::{
    fmt::Debug,
    pin::pin,
    task::{Context, Poll, Waker},
};

use protobuf::Message;
use vz_proto::{
    CreateContainerResponse, Event, ExecProcessResponse, ForwardReply, Hello, LogRecord, StatsResponse,
    WaitProcessResponse, frame,
};

/// What is read from memory is there at once.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => done,
        Poll::Pending => unreachable!("all bytes are there"),
    }
}

/// Reads frames until they end, and expects each to come back as it was.
fn frames<M: Message + PartialEq + Debug>(mut bytes: &[u8]) {
    while let Ok(Some(message)) = now(frame::read::<M>(&mut bytes)) {
        again(&message);
    }
}

fn again<M: Message + PartialEq + Debug>(message: &M) {
    let mut wire = Vec::new();
    match now(frame::write(&mut wire, message)) {
        Ok(()) => {
            let read = now(frame::read::<M>(&mut wire.as_slice())).expect("a frame that was written can be read");
            assert_eq!(read.as_ref(), Some(message));
        }
        Err(frame::Error::TooLarge(len)) => assert!(len > u64::from(frame::MAX_FRAME)),
        Err(e) => panic!("{e}"),
    }
}

fn message<M: Message + PartialEq + Debug>(bytes: &[u8]) {
    if let Ok(message) = M::parse_from_bytes(bytes) {
        again(&message);
    }
}

pub(crate) fn run(bytes: &[u8]) -> Result<(), String> {
    let Some((kind, bytes)) = bytes.split_first() else { return Ok(()) };
    match kind % 9 {
        0 => frames::<Hello>(bytes),
        1 => frames::<LogRecord>(bytes),
        2 => {
            if let Ok(token) = now(frame::read_token(&mut &*bytes)) {
                assert!(token.len() == frame::TOKEN_LEN && token.bytes().all(|byte| byte.is_ascii_alphanumeric()));
            }
        }
        3 => message::<Event>(bytes),
        4 => message::<StatsResponse>(bytes),
        5 => frames::<ForwardReply>(bytes),
        6 => message::<WaitProcessResponse>(bytes),
        7 => message::<ExecProcessResponse>(bytes),
        _ => message::<CreateContainerResponse>(bytes),
    }
    Ok(())
}
