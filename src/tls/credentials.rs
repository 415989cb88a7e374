//! The certificates of one side, kept as their files are.
//!
//! Files are read every few seconds and compared by their content: that holds for files that are replaced, for files
//! that are written in place, and for the links that Kubernetes turns over, without relying on times or notifications.
//! What does not fit, a key of another certificate or a file that is half written, is not taken: what was in use stays
//! in use, and the files are looked at again. A bundle of a trust domain that does not fit keeps out nothing but itself, and
//! one with an authority of another trust domain is used without that authority.
//! What is taken holds for the handshakes that follow; connections that are open go on.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use super::{
    Certificate, TlsError, TlsFiles, TlsMetrics, TlsUse,
    files::{Content, Fingerprint},
    material::{self, Material, Parsed},
};
use crate::{clock::Clock, key::Timestamp};

/// What one side of one channel shows of itself, and by what it judges the other.
#[derive(Debug)]
pub(crate) struct Credentials {
    used: TlsUse,
    files: TlsFiles,
    clock: Clock,
    metrics: TlsMetrics,
    current: ArcSwap<Material>,
    seen: Mutex<Seen>,
}

/// What was found at the last look.
#[derive(Debug)]
struct Seen {
    /// None when not all that was found could be taken.
    taken: Option<Fingerprint>,
    /// What was refused and why, so that it is told once.
    refused: Option<(Option<Fingerprint>, Vec<String>)>,
    /// Whether it was told that the certificate ends soon.
    warned: bool,
}

/// How often the files are read. A certificate that was replaced has hours left; that of a leaf, for which a new
/// authority was added, is not used by anybody within seconds.
const EVERY: Duration = Duration::from_secs(2);
/// How long before its end a certificate should have been replaced. Of one that lives shorter, the last third.
const WARN_BEFORE: Duration = Duration::from_hours(7 * 24);

impl Credentials {
    /// Reads `files` for the first time. A certificate that is not valid now is taken and told of: a sidecar whose
    /// certificate has expired still answers checks.
    ///
    /// # Errors
    ///
    /// When a file cannot be used, or they do not fit each other.
    pub(crate) fn load(
        used: TlsUse,
        files: TlsFiles,
        clock: Clock,
        metrics: TlsMetrics,
    ) -> Result<Arc<Self>, TlsError> {
        let content = files.read()?;
        let taken = Some(content.fingerprint());
        // Nothing was in use before, so that any problem is an error.
        let Parsed { material, .. } = Material::parse(content, &files, None)?;
        let credentials = Self {
            used,
            seen: Mutex::new(Seen {
                taken,
                refused: None,
                warned: false,
            }),
            current: ArcSwap::from_pointee(material),
            files,
            clock,
            metrics,
        };
        if let Err(error) = credentials.check_validity() {
            tracing::error!(
                tls.use = %used,
                error = &error as &dyn std::error::Error,
                "no handshake will succeed with this certificate"
            );
        }
        credentials.tell();
        credentials.warn(&mut credentials.lock());
        Ok(Arc::new(credentials))
    }

    /// Whether a file holds a private key that a start would take, whatever certificate it is of.
    ///
    /// # Errors
    ///
    /// When it cannot be read, everybody can use it, or it holds something else.
    pub(crate) fn check_key(path: &Path) -> Result<(), TlsError> {
        material::check_key(path)
    }

    /// Whether the certificate in use is valid now.
    ///
    /// # Errors
    ///
    /// When it is not valid yet, or not any more: no handshake succeeds with it.
    pub(crate) fn check_validity(&self) -> Result<(), TlsError> {
        let current = self.current.load();
        current.check_validity(&self.files, self.clock.wall())
    }

    /// Looks at the files every two seconds until `stop`.
    pub(crate) async fn keep(self: Arc<Self>, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = stop.cancelled() => return,
            }
            let credentials = Arc::clone(&self);
            // A file may lie on a disk or a network that hangs.
            let looked = tokio::task::spawn_blocking(move || credentials.look());
            tokio::select! {
                looked = looked => if looked.is_err() {
                    tracing::error!(tls.use = %self.used, "looking at the files of certificates has failed");
                },
                () = stop.cancelled() => return,
            }
        }
    }

    /// Looks at the files once, and takes what they hold when that is new and fits.
    pub(crate) fn look(&self) {
        let mut seen = self.lock();
        match self.files.read() {
            Ok(content) => {
                let found = content.fingerprint();
                if seen.taken == Some(found) {
                    seen.refused = None;
                } else {
                    match self.parse(content) {
                        Ok(parsed) => self.take(&mut seen, found, parsed),
                        Err(error) => self.refuse(&mut seen, Some(found), &[error]),
                    }
                }
            }
            Err(error) => self.refuse(&mut seen, None, &[error]),
        }
        self.warn(&mut seen);
    }

    /// What it is for.
    #[must_use]
    pub(crate) const fn used(&self) -> TlsUse {
        self.used
    }

    pub(super) fn current(&self) -> Arc<Material> {
        self.current.load_full()
    }

    pub(super) const fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(super) const fn metrics(&self) -> &TlsMetrics {
        &self.metrics
    }

    /// Its certificate with its file, for errors.
    pub(super) fn describe(&self) -> Option<String> {
        let current = self.current.load();
        let (own, files) = (current.own.as_ref()?, self.files.own.as_ref()?);
        Some(format!("{}: {}", files.cert.display(), own.certificate))
    }

    /// What becomes current next has to be valid, too: what was in use may be.
    fn parse(&self, content: Content) -> Result<Parsed, TlsError> {
        let parsed = Material::parse(content, &self.files, Some(&self.current.load()))?;
        let material = &parsed.material;
        material.check_validity(&self.files, self.clock.wall())?;
        Ok(parsed)
    }

    /// Takes what the files held, as far as it can be used.
    fn take(&self, seen: &mut Seen, found: Fingerprint, parsed: Parsed) {
        let Parsed { material, problems } = parsed;
        if problems.is_empty() {
            seen.taken = Some(found);
            seen.refused = None;
        } else {
            seen.taken = None;
            self.refuse(seen, Some(found), &problems);
        }
        if !material.is_same(&self.current.load()) {
            self.current.store(Arc::new(material));
            seen.warned = false;
            self.metrics.reloaded(self.used, true);
            self.tell();
        }
    }

    fn refuse(&self, seen: &mut Seen, found: Option<Fingerprint>, problems: &[TlsError]) {
        let refused = (found, problems.iter().map(ToString::to_string).collect());
        if seen.refused.as_ref() == Some(&refused) {
            return;
        }
        seen.refused = Some(refused);
        self.metrics.reloaded(self.used, false);
        for problem in problems {
            let error = problem as &dyn std::error::Error;
            if matches!(problem, TlsError::SharedAuthority { .. }) {
                tracing::error!(
                    tls.use = %self.used,
                    error,
                    "a bundle has changed and is used without the authorities that it shares with another one"
                );
            } else {
                tracing::error!(
                    tls.use = %self.used,
                    error,
                    "a certificate file has changed and is not used; what it held before stays in use"
                );
            }
        }
    }

    fn tell(&self) {
        let current = self.current.load();
        let Some(own) = &current.own else {
            return;
        };
        self.metrics.uses(self.used, &own.certificate);
        tracing::info!(
            tls.use = %self.used,
            certificate = %own.certificate,
            "this certificate is in use"
        );
    }

    fn warn(&self, seen: &mut Seen) {
        let current = self.current.load();
        let Some(own) = &current.own else {
            return;
        };
        if !seen.warned && ends_soon(&own.certificate, self.clock.wall()) {
            seen.warned = true;
            tracing::warn!(
                tls.use = %self.used,
                certificate = %own.certificate,
                "this certificate ends soon and was not replaced yet"
            );
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ends_soon(certificate: &Certificate, now: Timestamp) -> bool {
    let end = certificate.not_after();
    let life = end.saturating_since(certificate.not_before());
    end.saturating_since(now) < WARN_BEFORE.min(life / 3)
}

#[cfg(test)]
mod tests;
