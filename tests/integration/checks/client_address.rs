//! Clients behind load balancers: whose address counts for allowed sources, budgets and reports of use.

use std::net::IpAddr;

use serde_json::Value;

use super::{Gate, Kind, Mesh, reason_of};
use crate::support::{
    client::Request,
    envoy::{AuthzAddress, Envoy, EnvoyOptions, EnvoyVersion},
    eventually::eventually,
    process::relatch,
    reserved::own_address,
};

/// A sidecar that trusts one proxy, and the addresses of those who take part.
struct Behind {
    mesh: Mesh,
    proxy: IpAddr,
    client: IpAddr,
    other: IpAddr,
}

impl Behind {
    /// `more`: further fields of `client_address`. `file`: further lines of the sidecar's file.
    async fn start(from: &str, more: &str, file: &str) -> Self {
        let proxy = own_address();
        let setting =
            format!("client_address: {{ from: {from}, trusted: [{proxy}]{more} }}\n{file}");
        Self {
            mesh: Mesh::start_with(&setting).await,
            proxy: proxy.into(),
            client: own_address().into(),
            other: own_address().into(),
        }
    }

    /// A load balancer in front of `gate`, which is the trusted proxy.
    async fn balancer(&self, gate: &Gate) -> Envoy {
        let options = EnvoyOptions::balancer(self.proxy, gate.envoy.addr());
        Envoy::start(options.version(gate.kind.version)).await
    }

    /// Runs `test` with each Envoy: each version, with headers in a map and apart, set up by `setup`.
    async fn through_each_envoy(
        &self,
        setup: impl Fn(EnvoyOptions) -> EnvoyOptions,
        test: impl AsyncFn(&Gate),
    ) {
        for version in EnvoyVersion::ALL {
            for raw_headers in [false, true] {
                let kind = Kind {
                    version,
                    raw_headers,
                };
                let _blame = super::Blame(kind);
                test(&self.mesh.gate(kind, &setup).await).await;
            }
        }
    }
}

#[tokio::test]
async fn a_key_is_limited_to_clients_behind_a_load_balancer() {
    let behind = Behind::start("x-forwarded-for", "", "").await;
    let Behind {
        mesh,
        client,
        other,
        ..
    } = &behind;
    let key = mesh.key(&["--allow-source", &client.to_string()]).await;
    for appends in [false, true] {
        let setup = |options: EnvoyOptions| {
            if appends {
                options.use_remote_address()
            } else {
                options
            }
        };
        let test = async |gate: &Gate| {
            let balancer = behind.balancer(gate).await;
            let allowed = key.get("/").send_from(*client, balancer.addr()).await;
            allowed.seen();
            // Everybody can write the address of the client into a header.
            let forged = || key.get("/").header("x-forwarded-for", client.to_string());
            for (request, addr) in [
                (key.get("/"), balancer.addr()),
                (forged(), balancer.addr()),
                (forged().header("x-forwarded-for", ""), balancer.addr()),
                (key.get("/"), gate.envoy.addr()),
                (forged(), gate.envoy.addr()),
            ] {
                let denied = request.send_from(*other, addr).await;
                assert_eq!(reason_of(&denied), "source_not_allowed");
            }
            // Who comes past the balancer is a client, too.
            let direct = key.get("/").send_from(*client, gate.envoy.addr()).await;
            direct.seen();
            let log = gate.envoy.access_log(7).await;
            let shown: Vec<_> = log.iter().map(|line| address_in(&line["authz"])).collect();
            let (client, other) = (client.to_string(), other.to_string());
            let direct = |address: &str| {
                (
                    address.to_owned(),
                    "source.address (not trusted)".to_owned(),
                )
            };
            let forwarded = |address: &str| (address.to_owned(), "x-forwarded-for".to_owned());
            assert_eq!(
                shown,
                [
                    forwarded(&client),
                    forwarded(&other),
                    forwarded(&other),
                    forwarded(&other),
                    direct(&other),
                    direct(&other),
                    direct(&client),
                ]
            );
        };
        behind.through_each_envoy(setup, test).await;
    }
}

#[tokio::test]
async fn proxies_are_counted_where_they_have_no_known_address() {
    for appends in [false, true] {
        let more = format!(", hops: 2, envoy_appends: {appends}");
        let behind = Behind::start("x-forwarded-for", &more, "").await;
        let Behind { mesh, client, .. } = &behind;
        let key = mesh.key(&["--allow-source", &client.to_string()]).await;
        let setup = |options: EnvoyOptions| {
            if appends {
                options.use_remote_address()
            } else {
                options
            }
        };
        let test = async |gate: &Gate| {
            let balancer = behind.balancer(gate).await;
            let first = own_address().into();
            let from_first = async |forwarded_for: &str| {
                let request = key.get("/").header("x-forwarded-for", forwarded_for);
                request.send_from(first, balancer.addr()).await
            };
            from_first(&format!("192.0.2.66, {client}")).await.seen();
            for forwarded_for in [
                &format!("{client}, 192.0.2.66"),
                &format!("{client}, unknown"),
                "unknown",
            ] {
                let denied = from_first(forwarded_for).await;
                assert_eq!(reason_of(&denied), "source_not_allowed", "{forwarded_for}");
            }
            // A proxy fewer.
            let denied = key.get("/").send_from(*client, balancer.addr()).await;
            assert_eq!(reason_of(&denied), "source_not_allowed");
            let log = gate.envoy.access_log(5).await;
            let (address, from) = address_in(&log[4]["authz"]);
            assert_eq!(address, "");
            assert_eq!(from, "x-forwarded-for (too few addresses)");
        };
        behind.through_each_envoy(setup, test).await;
    }
}

#[tokio::test]
async fn the_external_address_of_envoy_is_the_client() {
    const NAME: &str = "x-envoy-external-address";
    let behind = Behind::start(NAME, "", "").await;
    let Behind {
        mesh,
        client,
        other,
        ..
    } = &behind;
    let key = mesh.key(&["--allow-source", &client.to_string()]).await;
    let setup = |options: EnvoyOptions| options.use_remote_address().trusted_hops(1);
    let test = async |gate: &Gate| {
        let balancer = behind.balancer(gate).await;
        let forged = || key.get("/").header(NAME, client.to_string());
        key.get("/")
            .send_from(*client, balancer.addr())
            .await
            .seen();
        for addr in [balancer.addr(), gate.envoy.addr()] {
            let denied = forged().send_from(*other, addr).await;
            assert_eq!(reason_of(&denied), "source_not_allowed");
        }
    };
    behind.through_each_envoy(setup, test).await;
}

#[tokio::test]
async fn a_client_that_fails_too_often_does_not_spend_the_budget_of_others() {
    let budget = "failed_credentials: { per_second: 1, burst: 1 }\n";
    let behind = Behind::start("x-forwarded-for", "", budget).await;
    let gate = behind.mesh.newest().await;
    let balancer = behind.balancer(&gate).await;
    let wrong = async |source: IpAddr, forwarded_for: String| {
        let request = Request::get("/").header("x-api-key", "wrong");
        let request = request.header("x-forwarded-for", forwarded_for);
        request.send_from(source, balancer.addr()).await.status
    };
    // Of many that come at once, most are one too many, whatever the client writes into the header.
    let mut statuses = Vec::new();
    for _ in 0..6 {
        statuses.push(wrong(behind.client, own_address().to_string()).await);
    }
    assert!(statuses.contains(&429), "{statuses:?}");
    // Three others have their own budgets. By chance, one of them may share a cell with the first.
    let mut unspent = 0;
    for other in [own_address(), own_address(), own_address()] {
        let status = wrong(other.into(), behind.client.to_string()).await;
        unspent += u32::from(status == 401);
    }
    assert!(unspent >= 2, "{unspent}");
}

#[tokio::test]
async fn who_still_uses_the_old_version_is_the_client() {
    let behind = Behind::start("x-forwarded-for", "", "").await;
    let Behind {
        mesh,
        proxy,
        client,
        ..
    } = &behind;
    let old = mesh.key(&[]).await;
    mesh.issue(&["rotate", "start", &old.id, "--overlap", "1h"])
        .await;
    let gate = mesh.newest().await;
    let balancer = behind.balancer(&gate).await;
    old.get("/")
        .send_from(*client, balancer.addr())
        .await
        .seen();
    let unknown = old.get("/").header("x-forwarded-for", "unknown");
    unknown.send_from(*proxy, gate.envoy.addr()).await.seen();
    let expected = [String::new(), client.to_string()];
    eventually("the sidecar has reported both callers", async || {
        let usage = mesh.control.cli_json(&["usage", &old.id]).await;
        let callers = usage["versions"][0]["callers"].as_array()?;
        let text = |caller: &Value| caller["source"].as_str().map(str::to_owned);
        let mut sources: Vec<_> = callers.iter().filter_map(text).collect();
        sources.sort_unstable();
        (sources == expected).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_address_that_counts_is_shown_with_how_it_was_found() {
    let more = ", hops: 1, envoy_appends: false";
    let behind = Behind::start("x-forwarded-for", more, "").await;
    let Behind { mesh, proxy, .. } = &behind;
    let status: Value = mesh.sidecar.get("/status").await.json();
    let setting = serde_json::json!({
        "from": "x-forwarded-for",
        "trusted": [format!("{proxy}/32")],
        "hops": 1,
        "envoy_appends": false,
    });
    assert_eq!(status["client_address"], setting);

    let AuthzAddress::Tcp(endpoint) = mesh.sidecar.ext_authz() else {
        panic!("not on TCP");
    };
    let endpoint = endpoint.to_string();
    let check = async |source: &str, forwarded_for: &str| {
        let header = format!("x-forwarded-for: {forwarded_for}");
        let args = [
            "check",
            "--no-key",
            "--endpoint",
            &endpoint,
            "--source",
            source,
            "--request-header",
            &header,
            "-o",
            "json",
        ];
        let output = relatch(&args, "").await;
        assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
        serde_json::from_str::<Value>(&output.stdout).expect("JSON")
    };
    for (source, forwarded_for, expected) in [
        (
            proxy.to_string().as_str(),
            "192.0.2.66, [2001:db8::1]:443",
            ("2001:db8::1", "x-forwarded-for"),
        ),
        (
            &proxy.to_string(),
            "_hidden",
            ("", "x-forwarded-for (not an address)"),
        ),
        (
            "192.0.2.1",
            "192.0.2.66",
            ("192.0.2.1", "source.address (not trusted)"),
        ),
    ] {
        let (address, from) = address_in(&check(source, forwarded_for).await);
        assert_eq!((address.as_str(), from.as_str()), expected);
    }
}

/// The address of the client and how it was found, in metadata; an empty text where there is none.
fn address_in(metadata: &Value) -> (String, String) {
    let text = |name: &str| metadata[name].as_str().unwrap_or_default().to_owned();
    (text("client_address"), text("client_address_from"))
}
