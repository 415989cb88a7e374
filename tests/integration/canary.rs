//! Canaries: known secrets of every kind go through a whole life, and then everything that any process wrote, sent or
//! showed is searched for them.
//!
//! All is logged, down to the finest level, and every check has its span. What holds a secret because that is its purpose
//! (the file of a pepper, the sink of a scheduled rotation) is left out of the search by name; a command that shows a new
//! secret has to show it exactly once.

mod echo;
mod leavings;
mod life;
mod scene;
mod search;
mod tee;

use serde_json::Value;

use crate::support::{
    envoy::{Envoy, EnvoyOptions},
    eventually::eventually,
    receiver::Receiver,
    upstream::Upstream,
};
use scene::{PARTNERS, PAYMENTS, Scene};
use tee::Tee;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_is_found_anywhere() {
    let mut scene = Scene::start().await;
    let upstream = Upstream::start().await;
    let edge = scene.sidecar("edge-1", "json").await;
    let on_demand = scene.sidecar("edge-2", "text").await;
    let options = EnvoyOptions::new(edge.ext_authz(), upstream.addr())
        .authz_over_tls(&scene.certs())
        .route("/partners", &[("relatch.keyring", PARTNERS)])
        .route("/scoped", &[("relatch.scopes", "everything")]);
    let envoy = Envoy::start(options).await;
    let hooks = Receiver::start().await;
    let hooked = Tee::before(hooks.addr()).await;

    // Every role has a token, and one was deleted.
    let mut tokens = Vec::new();
    for role in ["viewer", "issuer", "revoker", "admin"] {
        tokens.push(scene.token(role).await);
    }
    let ended = scene.token("viewer").await;
    scene.run(&["token", "end", &ended.id]).await;

    // Events are signed.
    let url = format!("http://{}/events", hooked.addr());
    let add = ["webhook", "add", "--keyring", PAYMENTS, "--url", &url];
    let add = [&add[..], &["--allow-private"]].concat();
    let webhook = scene.reveal(&add, "signing_secret").await;
    let signing = webhook["signing_secret"].as_str().expect("a secret");
    hooks.believe(signing);

    // Keys come, are used wherever a key can stand, and go.
    let first = scene.key().await;
    scene.use_key(&envoy, &first.secret, true).await;
    scene.check(&on_demand, &first.secret, true).await;
    let second = scene.rotate(&first.id).await;
    scene.use_key(&envoy, &first.secret, true).await;
    scene.use_key(&envoy, &second.secret, true).await;
    scene.run(&["usage", &first.id]).await;
    let retire = ["rotate", "retire", &first.id, "--version", "1"];
    let force = ["--force", "--reason", "tried out"];
    scene.run(&[&retire[..], &force].concat()).await;
    scene.use_key(&envoy, &first.secret, false).await;

    let back = scene.key().await;
    let given_up = scene.rotate(&back.id).await;
    let rollback = ["rotate", "rollback", &back.id, "--reason", "tried out"];
    scene.run(&[&rollback[..], &["--wait"]].concat()).await;
    scene.use_key(&envoy, &given_up.secret, true).await;
    scene.use_key(&envoy, &back.secret, true).await;

    let revoked = scene.key().await;
    scene.check(&on_demand, &revoked.secret, true).await;
    let revoke = ["revoke", &revoked.id, "--all", "--reason", "leaked"];
    scene.run(&[&revoke[..], &["--wait"]].concat()).await;
    scene.use_key(&envoy, &revoked.secret, false).await;
    scene.check(&on_demand, &revoked.secret, false).await;

    let imported = scene.import().await;
    let odd = scene
        .request("/partners", "")
        .header("x-api-key", &imported);
    assert_eq!(scene.ask(&envoy, odd).await.status, 200);

    let unknown = scene.present_what_is_no_key(&envoy, &on_demand).await;
    let two = scene.request("/two", "").header("x-api-key", &unknown);
    let two = two.header("authorization", format!("Bearer {}", first.secret));
    assert_eq!(scene.ask(&envoy, two).await.status, 400);
    let scoped = scene.request("/scoped", "");
    let scoped = scoped.header("x-api-key", &second.secret);
    assert_eq!(scene.ask(&envoy, scoped).await.status, 403);
    for key in [&first, &second, &given_up, &revoked] {
        scene.explain(&key.secret).await;
    }

    scene.rotate_by_schedule().await;
    scene.mistake(&first, &tokens[0], signing).await;
    scene.misconfigure().await;
    for args in [
        &["audit", "list", "--limit", "1000"][..],
        &["audit", "list", "--keyring", PAYMENTS, "--limit", "1000"],
        &["audit", "verify"],
        &["fleet"],
        &["key", "list"],
        &["key", "show", &first.id],
        &["token", "list"],
        &["webhook", "list"],
        &["webhook", "deliveries", "--keyring", PAYMENTS],
        &["rotate", "status", &first.id],
        &["keyring", "show", PAYMENTS],
        &["consumer", "list", "--keyring", PAYMENTS],
    ] {
        scene.run(args).await;
    }
    eventually("events have come", async || {
        (hooks.received().len() >= 5).then_some(())
    })
    .await;
    assert_eq!(hooks.refused(), [""; 0]);
    scene.left.add("webhook: what was sent", hooked.sent());

    // A sidecar is killed and starts from its file; a control plane is stopped and started again.
    let edge = scene.begin_again(edge).await;
    scene.look(&[&edge, &on_demand]).await;
    scene
        .left
        .add("Envoy: what relatch tells it", told_to(&envoy).await);
    for (name, mut sidecar) in [("edge-1", edge), ("edge-2", on_demand)] {
        assert!(sidecar.stop().await.success());
        scene.left.add_output(name, &sidecar.process);
    }
    scene.stop().await;
    scene.judge();
}

/// What relatch has told an Envoy of each request. Envoy writes its log from time to time: a denial for want of a scope, which
/// the search looks for, is among them.
async fn told_to(envoy: &Envoy) -> String {
    let log = eventually("Envoy logs a denial for want of a scope", async || {
        let log = envoy.access_log(1).await;
        let is_denial = |line: &Value| line["authz"]["reason"] == "insufficient_scope";
        log.iter().any(is_denial).then_some(log)
    })
    .await;
    let told = log.iter().map(|line| format!("{}\n", line["authz"]));
    told.collect()
}
