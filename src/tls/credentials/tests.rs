use std::{fs, os::unix::fs::symlink};

use prometheus_client::{encoding::text, registry::Registry};

use super::*;
use crate::tls::{
    Authorities,
    files::OwnFiles,
    testing::{Authority, Files, Issued, Leaf, set_mode},
};

/// One side whose files a test changes.
struct World {
    authority: Authority,
    files: Files,
    own: OwnFiles,
    registry: Registry,
    metrics: TlsMetrics,
}

impl World {
    fn new() -> Self {
        let (authority, files) = (Authority::new("CA"), Files::new());
        let own = files.pair("control", &authority.issue(&Leaf::server(&["first"])));
        let mut registry = Registry::default();
        let metrics = TlsMetrics::register(&mut registry);
        Self {
            authority,
            files,
            own,
            registry,
            metrics,
        }
    }

    fn load(&self) -> Result<Arc<Credentials>, TlsError> {
        let files = TlsFiles {
            own: Some(self.own.clone()),
            ca: None,
        };
        let (used, clock) = (TlsUse::DiscoveryServer, Clock::system());
        Credentials::load(used, files, clock, self.metrics.clone())
    }

    fn loaded(&self) -> Arc<Credentials> {
        self.load().unwrap_or_else(|error| panic!("{error}"))
    }

    fn issue(&self, name: &str) -> Issued {
        self.authority.issue(&Leaf::server(&[name]))
    }

    fn replace(&self, issued: &Issued) {
        self.files.pair("control", issued);
    }

    /// The text of the metrics.
    fn scrape(&self) -> String {
        let mut page = String::new();
        text::encode(&mut page, &self.registry).expect("text");
        page
    }

    fn reloads(&self, result: &str) -> String {
        let line =
            format!("relatch_tls_reloads_total{{use=\"discovery_server\",result=\"{result}\"}} ");
        let page = self.scrape();
        let found = page.lines().find_map(|found| found.strip_prefix(&line));
        found.unwrap_or("0").to_owned()
    }
}

/// The host that the current certificate is for.
fn in_use(credentials: &Credentials) -> String {
    let described = credentials.describe().expect("it has a certificate");
    let (_, rest) = described.split_once("CN=").expect("it has a name");
    rest.split(' ').next().unwrap_or_default().to_owned()
}

fn refusal(world: &World) -> String {
    world.load().expect_err("it does not fit").to_string()
}

#[test]
fn a_new_pair_is_taken_and_told_of() {
    let world = World::new();
    let credentials = world.loaded();
    credentials.look();
    assert_eq!(
        (in_use(&credentials), world.reloads("taken")),
        ("first".into(), "0".into())
    );
    world.replace(&world.issue("second"));
    credentials.look();
    assert_eq!(
        (in_use(&credentials), world.reloads("taken")),
        ("second".into(), "1".into())
    );
    let end = credentials
        .current()
        .own
        .as_ref()
        .map(|own| own.certificate.not_after());
    let end = end.expect("it has a certificate").as_millis() / 1_000;
    let gauge =
        format!("relatch_tls_certificate_not_after_seconds{{use=\"discovery_server\"}} {end}");
    assert!(world.scrape().contains(&gauge), "{gauge}");
}

#[test]
fn a_pair_that_comes_half_by_half_is_taken_when_it_is_whole() {
    let world = World::new();
    let credentials = world.loaded();
    let next = world.issue("second");
    // The certificate is there before its key, and is half written itself.
    let half = &next.cert[..next.cert.len() / 2];
    for (cert, refused) in [
        (half, "1"),
        (next.cert.as_str(), "2"),
        (next.cert.as_str(), "2"),
    ] {
        world.files.write("control.pem", cert);
        credentials.look();
        assert_eq!(in_use(&credentials), "first");
        assert_eq!(
            world.reloads("refused"),
            refused,
            "each state is told of once"
        );
    }
    world.files.write("control.key", &next.key);
    credentials.look();
    assert_eq!(
        (in_use(&credentials), world.reloads("taken")),
        ("second".into(), "1".into())
    );
}

#[test]
fn what_cannot_be_used_leaves_in_use_what_was() {
    let world = World::new();
    let credentials = world.loaded();
    let other = world.issue("other");
    let expired = world
        .authority
        .issue(&Leaf::server(&["expired"]).valid(-3, -1));
    let early = world.authority.issue(&Leaf::server(&["early"]).valid(1, 3));
    for (cert, key) in [
        ("", &other.key),
        (&other.cert, &String::new()),
        (
            &other.cert,
            &"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n".to_owned(),
        ),
        (&other.cert, &expired.key),
        (&expired.cert, &expired.key),
        (&early.cert, &early.key),
    ] {
        world.files.write("control.pem", cert);
        world.files.write("control.key", key);
        credentials.look();
        assert_eq!(in_use(&credentials), "first", "{cert}");
    }
    fs::remove_file(&world.own.key).expect("it is there");
    credentials.look();
    assert_eq!(
        (in_use(&credentials), world.reloads("taken")),
        ("first".into(), "0".into())
    );
    assert_eq!(world.reloads("refused"), "7");
}

/// As in Kubernetes: the files are links into a directory that is a link, which is switched.
#[test]
fn links_that_are_turned_over_are_followed() {
    let world = World::new();
    for (name, host) in [("one", "first"), ("two", "second")] {
        let issued = world.issue(host);
        fs::create_dir(world.files.path(name)).expect("a directory");
        for (file, text) in [("tls.crt", &issued.cert), ("tls.key", &issued.key)] {
            let path = world.files.path(name).join(file);
            fs::write(&path, text).expect("writable");
            set_mode(&path, 0o440);
        }
    }
    let data = world.files.path("..data");
    symlink("one", &data).expect("a link");
    let own = OwnFiles {
        cert: data.join("tls.crt"),
        key: data.join("tls.key"),
    };
    let world = World { own, ..world };
    let credentials = world.loaded();
    assert_eq!(in_use(&credentials), "first");
    let next = world.files.path("..data_tmp");
    symlink("two", &next).expect("a link");
    fs::rename(&next, &data).expect("a link is replaced");
    credentials.look();
    assert_eq!(in_use(&credentials), "second");
}

#[test]
fn a_key_that_everybody_can_read_is_refused_and_one_of_the_group_is_not() {
    let world = World::new();
    for (mode, is_fine) in [
        (0o600, true),
        (0o640, true),
        (0o440, true),
        (0o644, false),
        (0o601, false),
    ] {
        set_mode(&world.own.key, mode);
        assert_eq!(world.load().is_ok(), is_fine, "{mode:o}");
    }
    assert!(
        refusal(&world).contains("every user of this machine can read this private key (mode 601)")
    );
}

#[test]
fn errors_name_the_file_and_what_is_wrong_and_never_the_key() {
    let world = World::new();
    let (cert, key) = (world.own.cert.display(), world.own.key.display());
    let other = world.issue("other");
    for (cert_text, key_text, expected) in [
        (
            other.cert.as_str(),
            None,
            format!(
                "{key} is not the key of the certificate in {cert}: CN=other for other; issued by CN=CA; valid from "
            ),
        ),
        ("", None, format!("{cert}: holds no certificate in PEM")),
        (
            "-----BEGIN CERTIFICATE-----\nAAAA\n",
            None,
            format!("{cert}: holds a certificate that cannot be read"),
        ),
        (
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            None,
            format!("{cert}: holds a certificate that cannot be read"),
        ),
        (
            other.cert.as_str(),
            Some("secret"),
            format!("{key}: holds no private key in PEM that can be used"),
        ),
    ] {
        world.files.write("control.pem", cert_text);
        if let Some(text) = key_text {
            world.files.write("control.key", text);
        }
        let refused = refusal(&world);
        assert!(refused.starts_with(&expected), "{refused}");
        assert!(!refused.contains("secret"), "{refused}");
    }
    fs::remove_file(&world.own.key).expect("it is there");
    assert!(refusal(&world).starts_with(&format!("{key}: cannot be read")));
}

#[test]
fn a_certificate_that_has_expired_at_the_start_is_taken_all_the_same() {
    let world = World::new();
    world.replace(&world.authority.issue(&Leaf::server(&["old"]).valid(-3, -1)));
    assert_eq!(in_use(&world.loaded()), "old");
}

#[test]
fn a_certificate_ends_soon_within_a_week_or_the_last_third_of_a_short_life() {
    let authority = Authority::new("CA");
    for (from, to, soon) in [
        (-30, 8, false),
        (-30, 6, true),
        (-1, 6, false),
        (-5, 2, true),
    ] {
        let issued = authority.issue(&Leaf::server(&["a"]).valid(from, to));
        let read = Certificate::read(issued.der()).expect("a certificate");
        assert_eq!(
            ends_soon(&read, Clock::system().wall()),
            soon,
            "{from} {to}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn the_files_are_looked_at_while_it_runs() {
    let world = World::new();
    let credentials = world.loaded();
    world.replace(&world.issue("second"));
    let stop = CancellationToken::new();
    let kept = tokio::spawn(Arc::clone(&credentials).keep(stop.clone()));
    tokio::time::timeout(Duration::from_mins(1), async {
        while in_use(&credentials) != "second" {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await
    .expect("it is taken");
    stop.cancel();
    kept.await.expect("it ends");
}

/// One side with bundles, and the authorities in them.
struct Domains {
    files: Files,
    own: OwnFiles,
    mesh: Authority,
    other: Authority,
}

impl Domains {
    fn new() -> Self {
        let (files, mesh) = (Files::new(), Authority::new("mesh CA"));
        let own = files.pair("control", &mesh.issue(&Leaf::server(&["first"])));
        Self {
            files,
            own,
            mesh,
            other: Authority::new("other CA"),
        }
    }

    fn bundle(&self, name: &str, pem: &str) {
        self.files.write(&format!("{name}.pem"), pem);
    }

    fn load(&self) -> Result<Arc<Credentials>, TlsError> {
        let bundles = ["mesh.example", "other.example"].map(|name| {
            let domain = name.parse().expect("a trust domain");
            (domain, self.files.path(&format!("{name}.pem")))
        });
        let files = TlsFiles {
            own: Some(self.own.clone()),
            ca: Some(Authorities::Bundles(bundles.into())),
        };
        let (used, clock) = (TlsUse::DiscoveryServer, Clock::system());
        Credentials::load(used, files, clock, TlsMetrics::default())
    }

    fn loaded(&self) -> Arc<Credentials> {
        self.bundle("mesh.example", self.mesh.pem());
        self.bundle("other.example", self.other.pem());
        self.load().unwrap_or_else(|error| panic!("{error}"))
    }

    /// Whether `authority` may sign for a trust domain.
    fn is_trusted(credentials: &Credentials, domain: &str, authority: &Authority) -> bool {
        use rustls::pki_types::UnixTime;

        let leaf = Leaf::client("edge-1").uri(&format!("spiffe://{domain}/edge-1"));
        let issued = authority.issue(&leaf);
        let material = credentials.current();
        let judge = material.clients().expect("it judges");
        let verified = judge.verify_client_cert(&issued.der().into(), &[], UnixTime::now());
        verified.is_ok()
    }

    /// Returns the errors of the last look at the files.
    fn refused(credentials: &Credentials) -> Vec<String> {
        let seen = credentials.lock();
        seen.refused
            .as_ref()
            .map_or_else(Vec::new, |(_, problems)| problems.clone())
    }
}

#[test]
fn a_bundle_that_is_broken_keeps_out_nothing_but_itself() {
    let domains = Domains::new();
    let credentials = domains.loaded();
    let next = Authority::new("next mesh CA");
    for broken in ["", "-----BEGIN CERTIFICATE-----\nbm9uZQ==\n"] {
        domains.bundle("other.example", broken);
        credentials.look();
        let refused = Domains::refused(&credentials);
        assert_eq!(refused.len(), 1, "{refused:?}");
        assert!(
            refused[0].contains("other.example.pem: holds "),
            "{refused:?}"
        );
        assert!(Domains::is_trusted(
            &credentials,
            "other.example",
            &domains.other
        ));
    }
    fs::remove_file(domains.files.path("other.example.pem")).expect("it is there");
    // Other new content is used meanwhile: the bundle of our mesh, and our own certificate.
    domains.bundle("mesh.example", next.pem());
    let renewed = domains.mesh.issue(&Leaf::server(&["second"]));
    domains.files.pair("control", &renewed);
    credentials.look();
    let refused = Domains::refused(&credentials);
    assert!(
        refused[0].contains("other.example.pem: cannot be read"),
        "{refused:?}"
    );
    assert_eq!(in_use(&credentials), "second");
    assert!(Domains::is_trusted(
        &credentials,
        "other.example",
        &domains.other
    ));
    assert!(Domains::is_trusted(&credentials, "mesh.example", &next));
    assert!(!Domains::is_trusted(
        &credentials,
        "mesh.example",
        &domains.mesh
    ));

    let other = Authority::new("next other CA");
    domains.bundle("other.example", other.pem());
    credentials.look();
    assert!(Domains::refused(&credentials).is_empty());
    assert!(Domains::is_trusted(&credentials, "other.example", &other));
    assert!(!Domains::is_trusted(
        &credentials,
        "other.example",
        &domains.other
    ));
    // Back to the files that were loaded first.
    domains.bundle("mesh.example", domains.mesh.pem());
    domains.bundle("other.example", domains.other.pem());
    credentials.look();
    assert!(Domains::is_trusted(
        &credentials,
        "mesh.example",
        &domains.mesh
    ));
    assert!(!Domains::is_trusted(&credentials, "mesh.example", &next));
}

#[test]
fn no_authority_is_of_two_trust_domains() {
    let domains = Domains::new();
    let credentials = domains.loaded();
    let both = [domains.other.pem(), domains.mesh.pem()].concat();
    domains.bundle("other.example", &both);
    credentials.look();
    let refused = Domains::refused(&credentials);
    let why = "holds an authority that the bundle of mesh.example (";
    assert!(refused[0].contains(why), "{refused:?}");
    assert!(
        refused[0].contains("could sign for both: CN=mesh CA"),
        "{refused:?}"
    );
    assert!(!Domains::is_trusted(
        &credentials,
        "other.example",
        &domains.mesh
    ));
    assert!(Domains::is_trusted(
        &credentials,
        "other.example",
        &domains.other
    ));
    let at_start = domains.load().expect_err("it is of two").to_string();
    assert!(at_start.contains(why), "{at_start}");
}

#[test]
fn a_bundle_that_copies_the_root_of_another_keeps_no_root_in_use_that_is_deleted() {
    let domains = Domains::new();
    let (compromised, next) = (&domains.other, Authority::new("next other CA"));
    let credentials = domains.loaded();
    let is_trusted =
        |domain: &str, authority: &Authority| Domains::is_trusted(&credentials, domain, authority);
    domains.bundle("other.example", &[compromised.pem(), next.pem()].concat());
    credentials.look();
    assert!(is_trusted("other.example", &next));

    domains.bundle("mesh.example", &[domains.mesh.pem(), next.pem()].concat());
    credentials.look();
    domains.bundle("other.example", next.pem());
    credentials.look();

    assert!(!is_trusted("other.example", compromised));
    assert!(is_trusted("other.example", &next));
    assert!(is_trusted("mesh.example", &domains.mesh));
    assert!(!is_trusted("mesh.example", &next));
    let refused = Domains::refused(&credentials);
    assert_eq!(refused.len(), 1, "{refused:?}");
    let why = "mesh.example.pem: the bundle of mesh.example holds an authority that the bundle of other.example (";
    assert!(refused[0].contains(why), "{refused:?}");

    // The owner no longer holds it: it may move.
    let last = Authority::new("last other CA");
    domains.bundle("other.example", last.pem());
    credentials.look();
    assert!(is_trusted("mesh.example", &next));
    assert!(!is_trusted("other.example", &next));
    assert!(Domains::refused(&credentials).is_empty());
}

#[test]
fn a_bundle_that_copies_a_root_loses_what_its_own_file_lost() {
    let domains = Domains::new();
    let credentials = domains.loaded();
    domains.bundle("mesh.example", domains.other.pem());
    credentials.look();
    for authority in [&domains.mesh, &domains.other] {
        assert!(!Domains::is_trusted(
            &credentials,
            "mesh.example",
            authority
        ));
    }
    assert!(Domains::is_trusted(
        &credentials,
        "other.example",
        &domains.other
    ));
    assert_eq!(Domains::refused(&credentials).len(), 1);

    domains.bundle("mesh.example", domains.mesh.pem());
    credentials.look();
    assert!(Domains::is_trusted(
        &credentials,
        "mesh.example",
        &domains.mesh
    ));
    assert!(Domains::refused(&credentials).is_empty());
}

#[test]
fn an_authority_that_comes_into_two_bundles_at_once_is_trusted_for_neither() {
    let domains = Domains::new();
    let credentials = domains.loaded();
    let is_trusted =
        |domain: &str, authority: &Authority| Domains::is_trusted(&credentials, domain, authority);
    let (shared, next) = (Authority::new("shared CA"), Authority::new("next CA"));
    domains.bundle("mesh.example", &[domains.mesh.pem(), shared.pem()].concat());
    domains.bundle("other.example", &[shared.pem(), next.pem()].concat());
    // The second look finds the same: an authority in both bundles belongs to no trust domain.
    for _ in 0..2 {
        credentials.look();
        for domain in ["mesh.example", "other.example"] {
            assert!(!is_trusted(domain, &shared), "{domain}");
        }
        assert!(is_trusted("mesh.example", &domains.mesh));
        assert!(is_trusted("other.example", &next));
        assert!(!is_trusted("other.example", &domains.other));
    }
    let refused = Domains::refused(&credentials);
    for (found, name) in refused.iter().zip(["mesh.example", "other.example"]) {
        assert!(
            found.contains(&format!("{name}.pem: the bundle of {name} holds ")),
            "{found}"
        );
    }
    assert_eq!(refused.len(), 2, "{refused:?}");
}

#[test]
fn an_authority_that_cannot_be_compared_with_those_of_other_bundles_is_refused() {
    let domains = Domains::new();
    let credentials = domains.loaded();
    let malformed = Authority::malformed("malformed CA");
    assert_eq!(Certificate::read(&der(malformed.pem())), None);
    domains.bundle("other.example", malformed.pem());
    credentials.look();
    let refused = Domains::refused(&credentials);
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(
        refused[0].contains("other.example.pem: holds a certificate that cannot be read"),
        "{refused:?}"
    );
    assert!(!Domains::is_trusted(
        &credentials,
        "other.example",
        &malformed
    ));
}

#[test]
fn each_bundle_has_to_be_usable_at_the_start() {
    let domains = Domains::new();
    domains.bundle("mesh.example", domains.mesh.pem());
    let missing = domains.load().expect_err("no file").to_string();
    assert!(
        missing.contains("other.example.pem: cannot be read"),
        "{missing}"
    );
    domains.bundle("other.example", "");
    let empty = domains.load().expect_err("no certificate").to_string();
    assert!(
        empty.contains("other.example.pem: holds no certificate in PEM"),
        "{empty}"
    );
}

/// The certificate of a text in PEM.
fn der(pem: &str) -> Vec<u8> {
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};

    let der = CertificateDer::from_pem_slice(pem.as_bytes());
    der.expect("a certificate").to_vec()
}
