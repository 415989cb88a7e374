//! Builders for tests.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{Stream, stream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    key::{AllowedSources, Epoch, KeyId, Scopes, Window, operation::KeySpec, testing},
    proto::discovery::{self, control_message::Kind, keyring_discovery_server::KeyringDiscovery},
};

/// A control plane that has a message ready whenever the transport asks for one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Torrent {
    /// The number of messages that the transport asked for.
    sent: Arc<AtomicUsize>,
}

/// The size of a message in bytes.
const PIECE: usize = 4 << 10;
/// A transport that asks for no message for this time is full.
const STILL: Duration = Duration::from_millis(300);

impl Torrent {
    /// Returns the number of bytes that the transport has asked for, once it asks for no more.
    pub(crate) async fn has_sent(&self) -> usize {
        let mut before = 0;
        loop {
            tokio::time::sleep(STILL).await;
            let now = self.sent.load(Ordering::Relaxed);
            if now > 0 && now == before {
                return now * PIECE;
            }
            before = now;
        }
    }
}

#[tonic::async_trait]
impl KeyringDiscovery for Torrent {
    type SubscribeStream =
        Pin<Box<dyn Stream<Item = Result<discovery::ControlMessage, Status>> + Send>>;

    async fn subscribe(
        &self,
        _request: Request<Streaming<discovery::SidecarMessage>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let sent = Arc::clone(&self.sent);
        let message = move || {
            sent.fetch_add(1, Ordering::Relaxed);
            let reason = "x".repeat(PIECE);
            let keyring = String::new();
            Ok(discovery::ControlMessage {
                kind: Some(Kind::NotServed(discovery::NotServed {
                    keyring,
                    reason,
                    ..Default::default()
                })),
            })
        };
        Ok(Response::new(Box::pin(stream::repeat_with(message))))
    }
}

/// The settings of the keyring in tests.
pub(crate) fn settings(epoch: Epoch) -> discovery::KeyringSettings {
    let pepper = testing::pepper();
    discovery::KeyringSettings {
        keyring: testing::keyring_name().to_string(),
        epoch: epoch.get(),
        prefix: "rlk".to_owned(),
        issued_only: true,
        peppers: vec![discovery::Pepper {
            id: pepper.id().get(),
            secret: pepper.expose().to_vec().into(),
        }],
        help_url: String::new(),
    }
}

/// A key without bounds.
pub(crate) fn spec(key_id: KeyId) -> KeySpec {
    KeySpec {
        key_id,
        consumer: "checkout".parse().expect("a valid id"),
        name: String::new(),
        scopes: Scopes::default(),
        allowed_sources: AllowedSources::default(),
        window: Window::default(),
        imported: false,
    }
}
