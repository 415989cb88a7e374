//! Requests that relatch is asked about twice or never: redirects that Envoy follows, and routes without a check.

use super::{Mesh, reason_of};
use crate::support::{
    client::Request,
    envoy::{EnvoyOptions, Redirects},
    upstream::{LANDING, MOVED},
};

#[tokio::test]
async fn a_redirect_is_followed_behind_the_check_and_not_in_front_of_it() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let checked = |options: EnvoyOptions| options.redirects(Redirects::Checked);
    mesh.through_each_version(checked, async |gate| {
        // The second check finds no key: the first has removed it.
        let response = gate.send(key.get(MOVED)).await;
        assert_eq!(reason_of(&response), "missing_credential");
    })
    .await;
    let behind = |options: EnvoyOptions| options.redirects(Redirects::Behind);
    mesh.through_each_version(behind, async |gate| {
        let seen = gate.send(key.get(MOVED)).await.seen();
        assert_eq!(seen.target, LANDING);
        assert_eq!(seen.values("x-relatch-key-id"), [&key.id]);
        key.assert_hidden_from(&seen);
        let response = gate.send(Request::get(MOVED)).await;
        assert_eq!(reason_of(&response), "missing_credential");
        // What Envoy adds to a redirected request proves nothing.
        let forged = Request::get(LANDING).header("x-envoy-original-url", MOVED);
        assert_eq!(reason_of(&gate.send(forged).await), "missing_credential");
    })
    .await;
}

#[tokio::test]
async fn a_route_without_a_check_removes_identity_headers_itself() {
    let mesh = Mesh::start().await;
    let setup = |options: EnvoyOptions| options.unchecked("/public");
    mesh.through_each_version(setup, async |gate| {
        let forged = [
            "x-relatch-consumer",
            "X-Relatch-Key-Id",
            "x-relatch-key-version",
            "x-relatch-scopes",
        ];
        let request = forged
            .into_iter()
            .fold(Request::get("/public/page"), |request, name| {
                request.header(name, "root")
            });
        let seen = gate.send(request).await.seen();
        let names = seen.headers.iter().map(|(name, _)| name.as_str());
        let left: Vec<_> = names.filter(|name| name.contains("relatch")).collect();
        assert!(left.is_empty(), "{left:?}");
    })
    .await;
}
