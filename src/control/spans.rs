//! The spans of a control plane: admin calls, and the work that calls or due times cause.
//!
//! The parent of a span is the span that is current when it begins: for a commit, the call that
//! made it; for a wait for sidecars, its rotation. Calls are few: each has a span, whatever its
//! caller samples. Work at due times has a span only when it commits something. No work waits for a
//! collector: a span that ends goes into the queue of [`crate::telemetry::export`], and is dropped
//! and counted when the queue is full.
//!
//! Reasons, error messages and token names are texts of people and of other programs: no span
//! contains them.

use std::{
    collections::BTreeSet,
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use opentelemetry::{
    Array, Context, KeyValue, StringValue, Value,
    trace::{
        FutureExt as _, SpanBuilder, SpanKind, Status, TraceContextExt as _, Tracer as _,
        WithContext,
    },
};
use opentelemetry_sdk::trace::SdkTracer;

use super::journal::CommitOutcome;
use crate::{
    key::{Change, KeyId, KeyringName, Revision, RotationId},
    trace::TraceParent,
};

/// Creates spans, or nothing without a collector. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct ControlTracer(Option<SdkTracer>);

/// A span in progress; it ends when this is dropped. Empty when no spans are created.
#[derive(Debug)]
#[must_use = "the span ends when this is dropped"]
pub(crate) struct OpenSpan(Option<Context>);

/// A round of work that comes every second. It has a span as soon as something in it has one.
#[derive(Debug)]
#[must_use = "the round ends when this is dropped"]
pub(crate) struct Round(Option<Arc<LazySpan>>);

/// The planned changes of a commit.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    kinds: BTreeSet<&'static str>,
    keys: BTreeSet<KeyId>,
    rotations: BTreeSet<RotationId>,
}

/// A finished commit.
#[derive(Debug)]
pub(crate) struct CommitEvent<'a> {
    /// When the commit began.
    pub(crate) started: SystemTime,
    /// The actor, as the audit log names it.
    pub(crate) actor: &'a str,
    /// The keyring. None: the commit is in the log of the control plane itself.
    pub(crate) keyring: Option<&'a KeyringName>,
    /// The changes that were planned last.
    pub(crate) changes: &'a Changes,
    pub(crate) outcome: CommitOutcome,
    /// The last revision that the commit wrote.
    pub(crate) revision: Option<Revision>,
}

#[derive(Debug)]
struct LazySpan {
    tracer: ControlTracer,
    name: &'static str,
    started: SystemTime,
    context: OnceLock<Context>,
}

impl ControlTracer {
    /// Creates a tracer. Without an SDK tracer, it creates no spans.
    #[must_use]
    pub(crate) const fn new(tracer: Option<SdkTracer>) -> Self {
        Self(tracer)
    }

    /// Returns whether spans are created.
    #[must_use]
    pub(crate) const fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Begins the span of a call, as a child of its caller's span.
    pub(crate) fn call(&self, method: String, parent: Option<TraceParent>) -> OpenSpan {
        let parent = parent.map_or_else(Context::new, |parent| {
            Context::new().with_remote_span_context(parent.recording_context())
        });
        let attributes = [
            KeyValue::new("rpc.system.name", "grpc"),
            KeyValue::new("rpc.method", method.clone()),
        ];
        let builder = SpanBuilder::from_name(method)
            .with_kind(SpanKind::Server)
            .with_attributes(attributes);
        self.open(builder, &parent)
    }

    /// Begins a span as a child of the current one.
    pub(crate) fn begin(&self, name: &'static str) -> OpenSpan {
        if self.0.is_none() {
            return OpenSpan(None);
        }
        let parent = current().unwrap_or_default();
        self.open(SpanBuilder::from_name(name), &parent)
    }

    /// Begins a round, whose span would start at `started`.
    pub(crate) fn round(&self, name: &'static str, started: SystemTime) -> Round {
        Round(self.0.is_some().then(|| {
            Arc::new(LazySpan {
                tracer: self.clone(),
                name,
                started,
                context: OnceLock::new(),
            })
        }))
    }

    /// Records a commit that wrote something. Records one with another outcome only when a caller
    /// asked for it.
    pub(crate) fn commit(&self, event: &CommitEvent<'_>) {
        let is_asked_for = || Context::map_current(Context::has_active_span);
        if self.0.is_none() || event.outcome != CommitOutcome::Committed && !is_asked_for() {
            return;
        }
        let parent = current().unwrap_or_default();
        let builder = SpanBuilder::from_name("relatch.commit")
            .with_start_time(event.started)
            .with_attributes(event.attributes());
        let span = self.open(builder, &parent);
        if event.outcome == CommitOutcome::Failed {
            span.fail("commit_failed");
        }
    }

    fn open(&self, builder: SpanBuilder, parent: &Context) -> OpenSpan {
        OpenSpan(self.build(builder, parent))
    }

    fn build(&self, builder: SpanBuilder, parent: &Context) -> Option<Context> {
        let span = self.0.as_ref()?.build_with_context(builder, parent);
        Some(parent.with_span(span))
    }
}

impl OpenSpan {
    /// Sets an attribute.
    pub(crate) fn set(&self, key: &'static str, value: impl Into<Value>) {
        if let Some(context) = &self.0 {
            context.span().set_attribute(KeyValue::new(key, value));
        }
    }

    /// Sets the actor, without the name of its token.
    pub(crate) fn set_actor(&self, actor: &str) {
        self.set("relatch.actor", id_of(actor));
    }

    /// Marks the span as failed, and sets `error.type`.
    pub(crate) fn fail(&self, error_type: &'static str) {
        self.set("error.type", error_type);
        if let Some(context) = &self.0 {
            context.span().set_status(Status::error(""));
        }
    }

    /// Returns a future in which this is the current span.
    pub(crate) fn carry<F>(&self, future: F) -> WithContext<F> {
        future.with_context(self.0.clone().unwrap_or_else(Context::current))
    }
}

impl Drop for OpenSpan {
    fn drop(&mut self) {
        if let Some(context) = &self.0 {
            context.span().end();
        }
    }
}

impl Round {
    /// Returns a future whose spans belong to this round.
    pub(crate) fn carry<F>(&self, future: F) -> WithContext<F> {
        let context = match &self.0 {
            Some(lazy) => Context::current_with_value(Arc::clone(lazy)),
            None => Context::current(),
        };
        future.with_context(context)
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        if let Some(context) = self.0.as_ref().and_then(|lazy| lazy.context.get()) {
            context.span().end();
        }
    }
}

impl LazySpan {
    fn begun(&self) -> Context {
        let begin = || {
            let builder = SpanBuilder::from_name(self.name).with_start_time(self.started);
            let built = self.tracer.build(builder, &Context::new());
            built.unwrap_or_default()
        };
        self.context.get_or_init(begin).clone()
    }
}

impl Changes {
    /// Collects the kinds, keys and rotations of `changes`.
    pub(crate) fn of<'a>(changes: impl IntoIterator<Item = &'a Change>) -> Self {
        let mut told = Self::default();
        for change in changes {
            told.kinds.insert(change.kind());
            told.keys.extend(change.key_id());
            told.rotations.extend(change.rotation());
        }
        told
    }

    /// Describes one change that belongs to no keyring.
    #[must_use]
    pub(crate) fn of_kind(kind: &'static str) -> Self {
        Self {
            kinds: [kind].into(),
            ..Self::default()
        }
    }
}

impl CommitEvent<'_> {
    /// Returns the attributes of the span. They name a key or a rotation only when all changes
    /// belong to it: a commit of due changes can affect hundreds of keys.
    fn attributes(&self) -> Vec<KeyValue> {
        let kinds = self.changes.kinds.iter().copied().map(StringValue::from);
        let mut attributes = vec![
            KeyValue::new("relatch.actor", id_of(self.actor)),
            KeyValue::new("relatch.commit.outcome", self.outcome.as_str()),
            KeyValue::new(
                "relatch.change.kinds",
                Value::Array(Array::String(kinds.collect())),
            ),
        ];
        if let Some(keyring) = self.keyring {
            attributes.push(KeyValue::new("auth.keyring", keyring.to_string()));
        }
        if let Some(revision) = self.revision {
            attributes.push(KeyValue::new(
                "auth.keyring.revision",
                whole(revision.get()),
            ));
        }
        if let Some(key) = only(&self.changes.keys) {
            attributes.push(KeyValue::new("auth.key.id", key.to_string()));
        }
        if let Some(rotation) = only(&self.changes.rotations) {
            attributes.push(KeyValue::new("auth.rotation.id", rotation.to_string()));
        }
        attributes
    }
}

/// Sets the actor on the current span.
pub(crate) fn tell_actor(actor: &str) {
    Context::map_current(|context| {
        let span = context.span();
        if span.is_recording() {
            span.set_attribute(KeyValue::new("relatch.actor", id_of(actor)));
        }
    });
}

/// Returns a task whose spans belong to the span that is current now.
pub(crate) fn carried<F>(task: F) -> WithContext<F> {
    task.with_current_context()
}

/// Returns a report whose span belongs to the span that is current now, wherever the report runs.
pub(crate) fn carried_report<T>(report: impl FnOnce(T)) -> impl FnOnce(T) {
    let context = Context::current();
    move |told| {
        let _current = context.attach();
        report(told);
    }
}

/// Converts a number to the type of attributes; larger numbers become `i64::MAX`.
#[must_use]
pub(crate) fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Returns the context of the span that is the parent of a new one.
fn current() -> Option<Context> {
    let current = Context::current();
    if current.has_active_span() {
        return Some(current);
    }
    current.get::<Arc<LazySpan>>().map(|lazy| lazy.begun())
}

/// Returns an actor without the name of its token.
fn id_of(actor: &str) -> String {
    let id = actor.split_once(" (").map_or(actor, |(id, _)| id);
    id.to_owned()
}

fn only<T: Copy + Ord>(set: &BTreeSet<T>) -> Option<T> {
    set.first().copied().filter(|_| set.len() == 1)
}
