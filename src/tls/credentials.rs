//! The certificates of one side, kept equal to the files.
//!
//! The files are read every two seconds and compared by their content. This works for files that
//! are replaced, for files that are written in place, and for the links that Kubernetes switches,
//! without reliance on times or notifications. Files that do not fit, such as a key of another
//! certificate or a half-written file, are refused: the previous material stays in use, and the
//! next read checks the files again. A bundle that does not fit affects only its own trust domain,
//! and a bundle with an authority of another trust domain is used without that authority. New
//! material applies to later handshakes; open connections continue.

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

/// The certificates that one side of one channel presents, and the authorities with which it
/// verifies the other side.
#[derive(Debug)]
pub(crate) struct Credentials {
    used: TlsUse,
    files: TlsFiles,
    clock: Clock,
    metrics: TlsMetrics,
    current: ArcSwap<Material>,
    seen: Mutex<Seen>,
}

/// The result of the last look at the files.
#[derive(Debug)]
struct Seen {
    /// The content that is in use; none if a part of the content found was refused.
    taken: Option<Fingerprint>,
    /// The refused content and the reasons, so that each refusal is logged once.
    refused: Option<(Option<Fingerprint>, Vec<String>)>,
    /// Whether the warning that the certificate expires soon was logged.
    warned: bool,
}

/// The interval at which the files are read. A certificate that was replaced has hours left. After
/// a new authority was added, no certificate that it signed is in use within seconds.
const EVERY: Duration = Duration::from_secs(2);
/// The time before its expiry by which a certificate should have been replaced, or the last third
/// of its validity, if that is shorter.
const WARN_BEFORE: Duration = Duration::from_hours(7 * 24);

impl Credentials {
    /// Reads `files` for the first time. A certificate that is not valid now is loaded, and an
    /// error is logged: a sidecar whose certificate has expired still answers checks.
    ///
    /// # Errors
    ///
    /// When a file cannot be used, or the files do not fit each other.
    pub(crate) fn load(
        used: TlsUse,
        files: TlsFiles,
        clock: Clock,
        metrics: TlsMetrics,
    ) -> Result<Arc<Self>, TlsError> {
        let content = files.read()?;
        let taken = Some(content.fingerprint());
        // No material was in use before, so any problem is an error.
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

    /// Checks that a file contains a private key that a start would accept, for any certificate.
    ///
    /// # Errors
    ///
    /// When it cannot be read, every user can read it, or it contains no such key.
    pub(crate) fn check_key(path: &Path) -> Result<(), TlsError> {
        material::check_key(path)
    }

    /// Checks that the certificate in use is valid now.
    ///
    /// # Errors
    ///
    /// When it is not yet valid, or has expired: no handshake succeeds with it.
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
            // A file may be on a disk or a network that hangs.
            let looked = tokio::task::spawn_blocking(move || credentials.look());
            tokio::select! {
                looked = looked => if looked.is_err() {
                    tracing::error!(tls.use = %self.used, "the task that reads the certificate files has failed");
                },
                () = stop.cancelled() => return,
            }
        }
    }

    /// Looks at the files once, and loads their content if it is new and fits.
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

    /// Returns the purpose of the credentials.
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

    /// Returns the certificate with its file, for errors.
    pub(super) fn describe(&self) -> Option<String> {
        let current = self.current.load();
        let (own, files) = (current.own.as_ref()?, self.files.own.as_ref()?);
        Some(format!("{}: {}", files.cert.display(), own.certificate))
    }

    /// New content must be valid now, because the material in use may still be valid.
    fn parse(&self, content: Content) -> Result<Parsed, TlsError> {
        let parsed = Material::parse(content, &self.files, Some(&self.current.load()))?;
        let material = &parsed.material;
        material.check_validity(&self.files, self.clock.wall())?;
        Ok(parsed)
    }

    /// Uses the content of the files, except the parts with problems.
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
                    "a bundle has changed and is used without the authorities that it shares with another bundle"
                );
            } else {
                tracing::error!(
                    tls.use = %self.used,
                    error,
                    "a certificate file has changed and is not used; its previous content stays in use"
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
                "this certificate expires soon and was not replaced yet"
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
