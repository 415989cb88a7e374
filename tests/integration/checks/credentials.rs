//! Where a credential may be, and that it is taken away from there with nothing else touched.

use super::{Mesh, reason_of};
use crate::support::client::Request;

#[tokio::test]
async fn a_query_keeps_every_byte_but_the_credential() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let encode = |text: String, byte| text + &format!("%{byte:02x}");
    let encoded = key.secret.bytes().fold(String::new(), encode);
    mesh.through_each_envoy(async |gate| {
        for (sent, left) in [
            ("/p?api_key={key}", "/p"),
            ("/p?api%5Fkey={key}", "/p"),
            ("/p?%61pi%5fke%79={hex}", "/p"),
            ("/p?z=1&api%5Fkey={key}&a=2&z=3", "/p?z=1&a=2&z=3"),
            (
                "/p?b=%7e+%2F&&c&d=&api_key={key}&e=='x'",
                "/p?b=%7e+%2F&&c&d=&e=='x'",
            ),
            (
                "/p%2Fq/../r?API_KEY=1&api_keys=2&api_key={hex}",
                "/p%2Fq/../r?API_KEY=1&api_keys=2",
            ),
            (
                "/p?next=/login?api_key=1&api_key={key}",
                "/p?next=/login?api_key=1",
            ),
        ] {
            let target = sent
                .replace("{key}", &key.secret)
                .replace("{hex}", &encoded);
            for response in [
                gate.send(Request::get(&target)).await,
                gate.send_http2(Request::get(&target)).await,
            ] {
                let seen = response.seen();
                assert_eq!(seen.target, left, "{sent}");
                assert_eq!(seen.values("x-relatch-key-id"), [&key.id]);
                key.assert_hidden_from(&seen);
                assert!(!seen.target.contains(&encoded), "{sent}");
            }
        }
        // A `!` may be a byte that is not UTF-8, unless the headers are raw.
        let target = format!("/p!?z=1&api%5Fkey={}&&a", key.secret);
        let response = gate.send(Request::get(&target)).await;
        if gate.kind.raw_headers {
            assert_eq!(response.seen().target, "/p!?z=1&&a");
        } else {
            assert_eq!(reason_of(&response), "malformed_request");
        }
        let twice = format!("/p?api_key={0}&api%5Fkey={0}", key.secret);
        assert_eq!(
            reason_of(&gate.send(Request::get(&twice)).await),
            "ambiguous_credential"
        );
    })
    .await;
}

#[tokio::test]
async fn a_cookie_goes_and_the_others_stay() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        for (sent, left) in [
            ("api_key={key}", None),
            ("a=1; api_key={key}; b=\"2,3\"", Some("a=1; b=\"2,3\"")),
            ("api_key=\"{key}\"; session=x=y", Some("session=x=y")),
            ("API_KEY=1; api_key={key}", Some("API_KEY=1")),
        ] {
            let cookie = sent.replace("{key}", &key.secret);
            let seen = gate
                .send(Request::get("/").header("cookie", cookie))
                .await
                .seen();
            assert_eq!(seen.values("cookie"), Vec::from_iter(left), "{sent}");
            assert_eq!(seen.values("x-relatch-key-id"), [&key.id], "{sent}");
            key.assert_hidden_from(&seen);
        }
        let crumbs = Request::get("/")
            .header("cookie", "a=1")
            .header("cookie", format!("api_key={}", key.secret))
            .header("cookie", "b=2");
        let seen = gate.send_http2(crumbs).await.seen();
        assert_eq!(seen.values("cookie"), ["a=1; b=2"]);
        key.assert_hidden_from(&seen);

        // A byte that is not UTF-8 cannot be sent back, and without raw headers it looks like a `!`.
        for (other, passes) in [(&b"a=\xff"[..], false), (b"a=!", gate.kind.raw_headers)] {
            let cookie = [other, b"; api_key=", key.secret.as_bytes()].concat();
            let response = gate.send(Request::get("/").header("cookie", cookie)).await;
            if passes {
                assert_eq!(response.seen().values("cookie"), ["a=!"]);
            } else {
                assert_eq!(reason_of(&response), "malformed_request");
            }
        }

        // Two lines are apart when raw. In a map they are one with a comma, in which a cookie's end cannot be told.
        let first = format!("a=1; api_key={}", key.secret);
        let last = format!("api_key={}; b=2", key.secret);
        for lines in [[first.as_str(), "b=2"], ["a=1", last.as_str()]] {
            let request = lines.into_iter().fold(Request::get("/"), |request, line| {
                request.header("cookie", line)
            });
            let response = gate.send(request).await;
            if gate.kind.raw_headers {
                let seen = response.seen();
                assert_eq!(seen.values("cookie"), ["a=1; b=2"]);
                key.assert_hidden_from(&seen);
            } else {
                assert_eq!(reason_of(&response), "ambiguous_credential");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn bearer_is_ours_and_basic_is_left_alone() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        for scheme in ["Bearer", "bEARER "] {
            let request =
                Request::get("/").header("Authorization", format!("{scheme} {}", key.secret));
            let seen = gate.send(request).await.seen();
            assert_eq!(seen.values("authorization").len(), 0);
            assert_eq!(seen.values("x-relatch-key-id"), [&key.id]);
            key.assert_hidden_from(&seen);
        }
        let seen = gate
            .send(key.get("/").header("Authorization", "Basic dTpw"))
            .await
            .seen();
        assert_eq!(seen.values("authorization"), ["Basic dTpw"]);
        let anonymous = Request::get("/optional").header("Authorization", "Basic dTpw");
        let seen = gate.send(anonymous).await.seen();
        assert_eq!(seen.values("authorization"), ["Basic dTpw"]);
        assert_eq!(seen.values("x-relatch-consumer").len(), 0);

        // Envoy joins the lines of this header also where it tells of headers apart.
        let bearer = format!("Bearer {}", key.secret);
        for lines in [["Basic dTpw", &bearer], [&bearer, "Basic dTpw"]] {
            for request in [key.get("/"), Request::get("/optional")] {
                let request = lines.into_iter().fold(request, |request, line| {
                    request.header("authorization", line)
                });
                for response in [
                    gate.send(request.clone()).await,
                    gate.send_http2(request).await,
                ] {
                    assert_eq!(reason_of(&response), "ambiguous_credential");
                }
            }
        }
    })
    .await;
}

#[tokio::test]
async fn one_key_in_all_places_is_one_and_is_taken_from_all() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        let everywhere = key
            .get(&format!("/p?a=1&api_key={}", key.secret))
            .header("authorization", format!("Bearer {}", key.secret))
            .header("cookie", format!("api_key={}; b=2", key.secret));
        for response in [
            gate.send(everywhere.clone()).await,
            gate.send_http2(everywhere).await,
        ] {
            let seen = response.seen();
            assert_eq!(seen.target, "/p?a=1");
            assert_eq!(seen.values("cookie"), ["b=2"]);
            assert_eq!(seen.values("authorization").len(), 0);
            assert_eq!(seen.values("x-relatch-consumer"), ["checkout"]);
            key.assert_hidden_from(&seen);
        }
        // Apart, a value with a comma is one that no keyring of ours issues; in a map it is two.
        let joined = if gate.kind.raw_headers {
            "malformed_credential"
        } else {
            "ambiguous_credential"
        };
        let twice = format!("{0},{0}", key.secret);
        for (request, reason) in [
            (
                key.get("/").header("x-api-key", &key.secret),
                "ambiguous_credential",
            ),
            (key.get("/").header("x-api-key", ""), "ambiguous_credential"),
            (Request::get("/").header("x-api-key", twice), joined),
        ] {
            assert_eq!(reason_of(&gate.send(request).await), reason);
        }
    })
    .await;
    assert_eq!(mesh.upstream.requests(), 8);
}
