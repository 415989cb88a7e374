//! The requests: checks as Envoy sends them, or requests as consumers send them to Envoy, each with another key.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Result;

use super::frame::{self, FieldBlock, METHOD_GET, METHOD_POST, Name, SCHEME_HTTP, kind};
use crate::{keys::Keys, request::CheckTemplate};

/// Requests that differ in their keys.
#[derive(Debug)]
pub(crate) struct Traffic {
    fields: FieldBlock,
    message: Message,
    keys: Arc<Keys>,
    /// The number of different keys.
    presented: u64,
}

/// The expected answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// A gRPC message.
    Message,
    /// Any page with status 200.
    Page,
}

/// Whether the span of Envoy, in the metadata of the call, is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sampling {
    Sampled,
    Unsampled,
}

#[derive(Debug)]
enum Message {
    Check {
        template: CheckTemplate,
        /// There is no span of Envoy.
        sampling: Option<Sampling>,
    },
    Get,
}

/// The headers of a browser's request after a load balancer, as in the recording of [`CheckTemplate`].
const CONSUMER_FIELDS: [(Name, &str); 5] = [
    (Name::ACCEPT, "application/json, text/plain, */*"),
    (
        Name::USER_AGENT,
        "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36",
    ),
    (Name::Text("x-request-start"), "1700000000"),
    (Name::Text("x-forwarded-for"), "203.0.113.7"),
    (Name::Text("accept-encoding"), "gzip, deflate, br"),
];

impl Traffic {
    /// Checks with the first `presented` of `keys`, in turn.
    ///
    /// # Errors
    ///
    /// When the recording is not the expected request.
    pub(crate) fn checks(address: SocketAddr, keys: &Arc<Keys>, presented: u64) -> Result<Self> {
        let authority = address.to_string();
        let fields = [
            (Name::AUTHORITY, authority.as_str()),
            (Name::PATH, "/envoy.service.auth.v3.Authorization/Check"),
            (Name::CONTENT_TYPE, "application/grpc"),
            (Name::Text("te"), "trailers"),
        ];
        Ok(Self {
            fields: FieldBlock::new(&[METHOD_POST, SCHEME_HTTP], &fields),
            message: Message::Check {
                template: CheckTemplate::recorded()?,
                sampling: None,
            },
            keys: Arc::clone(keys),
            presented: presented.min(keys.len()),
        })
    }

    /// Adds a span of Envoy to each request, each of another trace.
    pub(crate) fn traced(self, sampling: Sampling) -> Self {
        let message = match self.message {
            Message::Check { template, .. } => Message::Check {
                template,
                sampling: Some(sampling),
            },
            Message::Get => Message::Get,
        };
        Self { message, ..self }
    }

    /// Requests of consumers to Envoy, with all of `keys` in turn.
    pub(crate) fn gets(address: SocketAddr, keys: &Arc<Keys>) -> Self {
        let authority = address.to_string();
        let fields = [
            (Name::AUTHORITY, authority.as_str()),
            (Name::PATH, "/v1/orders?limit=10&cursor=abcdef"),
        ];
        let fields: Vec<_> = fields.into_iter().chain(CONSUMER_FIELDS).collect();
        Self {
            fields: FieldBlock::new(&[METHOD_GET, SCHEME_HTTP], &fields),
            message: Message::Get,
            keys: Arc::clone(keys),
            presented: keys.len(),
        }
    }

    /// The expected answer.
    pub(crate) const fn reply(&self) -> Reply {
        match self.message {
            Message::Check { .. } => Reply::Message,
            Message::Get => Reply::Page,
        }
    }

    /// The length of the DATA of a request, in bytes.
    pub(crate) const fn body_len(&self) -> usize {
        match &self.message {
            Message::Check { template, .. } => template.framed_len(),
            Message::Get => 0,
        }
    }

    /// Writes request `number` as frames, and returns the length of its DATA.
    pub(crate) fn write(
        &self,
        number: u64,
        is_first: bool,
        stream: u32,
        out: &mut Vec<u8>,
    ) -> usize {
        // The keys are spread over the whole keyring, in any order of it.
        let chosen = number % self.presented * (self.keys.len() / self.presented);
        let key = self.keys.get(chosen);
        let begin = out.len();
        let mut flags = frame::END_HEADERS;
        frame::write(out, kind::HEADERS, 0, stream, self.fields.bytes(is_first));
        match &self.message {
            Message::Check { sampling: None, .. } => {}
            Message::Check {
                sampling: Some(sampling),
                ..
            } => {
                let flag = match sampling {
                    Sampling::Sampled => 1,
                    Sampling::Unsampled => 0,
                };
                let trace = number + 1;
                let parent = format!("00-{trace:032x}-b7ad6b7169203331-{flag:02}");
                frame::field("traceparent", parent.as_bytes(), out);
            }
            Message::Get => {
                flags |= frame::END_STREAM;
                frame::field("x-api-key", key, out);
            }
        }
        let block = u32::try_from(out.len() - begin - frame::HEAD_LEN).expect("fields are short");
        out[begin..begin + 3].copy_from_slice(&block.to_be_bytes()[1..]);
        out[begin + 4] = flags;
        match &self.message {
            Message::Check { template, .. } => {
                let begin = out.len();
                frame::write(
                    out,
                    kind::DATA,
                    frame::END_STREAM,
                    stream,
                    template.as_bytes(),
                );
                template.present(key, &mut out[begin + frame::HEAD_LEN..]);
                template.framed_len()
            }
            Message::Get => 0,
        }
    }
}
