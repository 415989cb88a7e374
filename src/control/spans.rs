//! The spans of a control plane: admin calls, and what they or time bring about.
//!
//! A span belongs to the one that is current where it begins: a commit to the call that made it, a wait for sidecars to
//! its rotation. Calls are few, so that each has a span, whatever its caller samples. What time brings about has a span
//! only where something was committed. Nobody waits for a collector: a span that ends goes into the queue of
//! [`crate::telemetry::export`], and is dropped and counted when that is full.
//!
//! Reasons, messages of errors and names of tokens are texts of people and of other programs, and therefore in no span.

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

/// Makes spans, or nothing where there is no collector; cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct ControlTracer(Option<SdkTracer>);

/// A span that is under way; it ends when this is dropped. Nothing where no spans are made.
#[derive(Debug)]
#[must_use = "the span ends when this is dropped"]
pub(crate) struct OpenSpan(Option<Context>);

/// A round of work that comes every second. It has a span as soon as something in it has one.
#[derive(Debug)]
#[must_use = "the round ends when this is dropped"]
pub(crate) struct Round(Option<Arc<LazySpan>>);

/// What a commit was to change.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    kinds: BTreeSet<&'static str>,
    keys: BTreeSet<KeyId>,
    rotations: BTreeSet<RotationId>,
}

/// A commit that is over.
#[derive(Debug)]
pub(crate) struct CommitEvent<'a> {
    /// When it began.
    pub(crate) started: SystemTime,
    /// Who made it, as the audit log names them.
    pub(crate) actor: &'a str,
    /// Of which keyring; none: of the control plane itself.
    pub(crate) keyring: Option<&'a KeyringName>,
    /// What was planned last.
    pub(crate) changes: &'a Changes,
    /// What became of it.
    pub(crate) outcome: CommitOutcome,
    /// The last revision that it wrote.
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
    /// Without a tracer there are no spans.
    #[must_use]
    pub(crate) const fn new(tracer: Option<SdkTracer>) -> Self {
        Self(tracer)
    }

    /// Whether spans are made.
    #[must_use]
    pub(crate) const fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Begins the span of a call, below that of its caller.
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

    /// Begins a span below the current one.
    pub(crate) fn begin(&self, name: &'static str) -> OpenSpan {
        if self.0.is_none() {
            return OpenSpan(None);
        }
        let parent = current().unwrap_or_default();
        self.open(SpanBuilder::from_name(name), &parent)
    }

    /// Begins a round.
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

    /// Tells of a commit that wrote something, and of one that failed where somebody had asked for it.
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
    /// Adds an attribute.
    pub(crate) fn set(&self, key: &'static str, value: impl Into<Value>) {
        if let Some(context) = &self.0 {
            context.span().set_attribute(KeyValue::new(key, value));
        }
    }

    /// Adds who acts.
    pub(crate) fn set_actor(&self, actor: &str) {
        self.set("relatch.actor", id_of(actor));
    }

    /// Notes that it failed, and what in.
    pub(crate) fn fail(&self, error_type: &'static str) {
        self.set("error.type", error_type);
        if let Some(context) = &self.0 {
            context.span().set_status(Status::error(""));
        }
    }

    /// A future in which this is the current span.
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
    /// A future whose spans belong to this round.
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
    /// What `changes` are.
    pub(crate) fn of<'a>(changes: impl IntoIterator<Item = &'a Change>) -> Self {
        let mut told = Self::default();
        for change in changes {
            told.kinds.insert(change.kind());
            told.keys.extend(change.key_id());
            told.rotations.extend(change.rotation());
        }
        told
    }

    /// One change that is not of a keyring.
    #[must_use]
    pub(crate) fn of_kind(kind: &'static str) -> Self {
        Self {
            kinds: [kind].into(),
            ..Self::default()
        }
    }
}

impl CommitEvent<'_> {
    /// A key or a rotation is named where all changes are of one: a commit of what time made due may be of hundreds.
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

/// Adds to the current span who acts.
pub(crate) fn tell_actor(actor: &str) {
    Context::map_current(|context| {
        let span = context.span();
        if span.is_recording() {
            span.set_attribute(KeyValue::new("relatch.actor", id_of(actor)));
        }
    });
}

/// A task whose spans belong to the span that is current now.
pub(crate) fn carried<F>(task: F) -> WithContext<F> {
    task.with_current_context()
}

/// A report whose span belongs to the span that is current now, wherever it is made.
pub(crate) fn carried_report<T>(report: impl FnOnce(T)) -> impl FnOnce(T) {
    let context = Context::current();
    move |told| {
        let _current = context.attach();
        report(told);
    }
}

/// A number as attributes hold it.
#[must_use]
pub(crate) fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The context of the span to which a new one belongs.
fn current() -> Option<Context> {
    let current = Context::current();
    if current.has_active_span() {
        return Some(current);
    }
    current.get::<Arc<LazySpan>>().map(|lazy| lazy.begun())
}

/// An actor without the name that people gave its token.
fn id_of(actor: &str) -> String {
    let id = actor.split_once(" (").map_or(actor, |(id, _)| id);
    id.to_owned()
}

fn only<T: Copy + Ord>(set: &BTreeSet<T>) -> Option<T> {
    set.first().copied().filter(|_| set.len() == 1)
}
