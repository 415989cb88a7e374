//! `relatch token`: creates, lists and deletes admin tokens.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use super::{
    Session,
    connection::{Admin, answer},
    convert,
    failure::{Failure, required},
    idempotency::{IdempotencyArgs, answered, forgotten, not_shown},
    output::{self, Listing, Row, View},
    secret::Revealed,
    value, words,
};
use crate::{
    key::{IdempotencyKey, Timestamp},
    proto::admin,
};

/// The commands of `token`.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Create an admin token, and print it once
    Create(CreateArgs),
    /// List the admin tokens, including deleted ones
    List,
    /// Delete an admin token: it is rejected immediately and permanently, and `token list` shows when it was deleted
    ///
    /// The last token with role admin that does not expire cannot be deleted: create another one first.
    End(EndArgs),
}

/// The arguments of `token create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name of the person or program that uses the token; the audit log records it
    #[arg(long)]
    name: String,

    /// Role of the token
    #[arg(long)]
    role: Role,

    /// Lifetime of the token, for example 90d [default: the token does not expire]
    #[arg(long, value_name = "DURATION", value_parser = value::positive_duration)]
    expires_in: Option<Duration>,

    #[command(flatten)]
    idempotency: IdempotencyArgs,
}

/// The arguments of `token end`.
#[derive(Debug, Args)]
pub struct EndArgs {
    /// Id of the token, as `relatch token list` shows it
    #[arg(value_name = "TOKEN_ID")]
    id: String,
}

/// The role of an admin token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Read everything except secrets, which nobody can read
    Viewer,
    /// Also create consumers and keys, and rotate keys
    Issuer,
    /// Read, and revoke
    Revoker,
    /// Everything
    Admin,
}

/// An admin token without its secret.
#[derive(Debug, Serialize)]
struct TokenView {
    id: String,
    name: String,
    role: String,
    created_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    ended_at: Option<Timestamp>,
}

/// A new admin token.
#[derive(Debug, Serialize)]
struct CreatedToken {
    #[serde(flatten)]
    token: TokenView,
    secret: Option<Revealed>,
}

impl TokenCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::Create(args) => {
                let key = args.idempotency.key()?;
                let request = args.into_request(&key);
                let created = answered(session, &key, async |mut admin: Admin| {
                    answer(admin.create_token(request.clone())).await
                });
                let created = created.await?;
                let token = required(created.token, "token")?;
                if created.secret_forgotten {
                    let stands = format!("token {} ({}) was created", token.id, token.name);
                    let hint = format!(
                        "if nobody has the secret: relatch token end {}, then create another token",
                        token.id
                    );
                    return Err(forgotten(&stands, hint));
                }
                let view = CreatedToken {
                    token: token.into(),
                    secret: Revealed::new(created.secret),
                };
                session
                    .show(&view)
                    .map_err(|failure| not_shown(failure, &key))
            }
            Self::List => {
                let mut admin = session.admin().await?;
                let list = answer(admin.list_tokens(admin::ListTokensRequest {})).await?;
                let tokens = list.tokens.into_iter().map(TokenView::from).collect();
                session.show(&Listing(tokens))
            }
            Self::End(args) => {
                let mut admin = session.admin().await?;
                let request = admin::EndTokenRequest { id: args.id };
                let ended = answer(admin.end_token(request)).await?;
                let token = required(ended.token, "token")?;
                session.show(&TokenView::from(token))
            }
        }
    }
}

impl CreateArgs {
    fn into_request(self, idempotency_key: &IdempotencyKey) -> admin::CreateTokenRequest {
        admin::CreateTokenRequest {
            name: self.name,
            role: admin::Role::from(self.role).into(),
            expires_in: self.expires_in.map(convert::to_duration),
            idempotency_key: idempotency_key.as_str().to_owned(),
        }
    }
}

impl From<Role> for admin::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Viewer => Self::Viewer,
            Role::Issuer => Self::Issuer,
            Role::Revoker => Self::Revoker,
            Role::Admin => Self::Admin,
        }
    }
}

impl From<admin::Token> for TokenView {
    fn from(token: admin::Token) -> Self {
        Self {
            id: token.id,
            name: token.name,
            role: role_name(token.role).to_owned(),
            created_at: convert::timestamp(token.created_at),
            expires_at: convert::timestamp(token.expires_at),
            ended_at: convert::timestamp(token.ended_at),
        }
    }
}

impl View for TokenView {
    fn render(&self, _now: Timestamp) -> String {
        output::facts(&[
            ("ID", self.id.clone()),
            ("NAME", self.name.clone()),
            ("ROLE", self.role.clone()),
            ("CREATED", words::time(self.created_at)),
            ("EXPIRES", words::time(self.expires_at)),
            ("ENDED", words::time(self.ended_at)),
        ])
    }
}

impl View for CreatedToken {
    fn render(&self, now: Timestamp) -> String {
        self.token.render(now)
    }

    fn secret(&self) -> Option<&Revealed> {
        self.secret.as_ref()
    }
}

impl Row for TokenView {
    const TITLES: &[&str] = &["ID", "NAME", "ROLE", "CREATED", "EXPIRES", "ENDED"];

    fn cells(&self, now: Timestamp) -> Vec<Vec<String>> {
        vec![vec![
            self.id.clone(),
            words::or_nothing(&self.name),
            self.role.clone(),
            words::when(self.created_at, now),
            words::when(self.expires_at, now),
            words::when(self.ended_at, now),
        ]]
    }
}

fn role_name(role: i32) -> &'static str {
    match admin::Role::try_from(role) {
        Ok(admin::Role::Viewer) => "viewer",
        Ok(admin::Role::Issuer) => "issuer",
        Ok(admin::Role::Revoker) => "revoker",
        Ok(admin::Role::Admin) => "admin",
        Ok(admin::Role::Unspecified) | Err(_) => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::{super::output::tests::fits, *};

    fn token() -> admin::Token {
        admin::Token {
            id: "tok1".to_owned(),
            name: "deploy".to_owned(),
            role: admin::Role::Issuer as i32,
            created_at: Some(prost_types::Timestamp {
                seconds: 1_767_225_600,
                nanos: 0,
            }),
            expires_at: None,
            ended_at: None,
        }
    }

    #[test]
    fn json_of_a_created_token_ends_with_its_secret() {
        let created = CreatedToken {
            token: token().into(),
            secret: Revealed::new("rlt_x".to_owned()),
        };
        assert_eq!(
            serde_json::to_string(&created).expect("serializable"),
            r#"{"id":"tok1","name":"deploy","role":"issuer","created_at":"2026-01-01T00:00:00.000Z","expires_at":null,"ended_at":null,"secret":"rlt_x"}"#
        );
        assert!(!created.render(Timestamp::from_millis(0)).contains("rlt_x"));
        assert!(!format!("{created:?}").contains("rlt_x"));
    }

    #[test]
    fn tokens_are_listed_a_line_each() {
        let day = |days: i64| {
            Some(prost_types::Timestamp {
                seconds: 1_767_225_600 + days * 86_400,
                nanos: 0,
            })
        };
        let ended = admin::Token {
            id: "4fK0pQz81LmN".to_owned(),
            expires_at: day(90),
            ended_at: day(1),
            ..token()
        };
        let list = Listing([token(), ended].map(TokenView::from).into());
        assert_eq!(
            fits(list.render(Timestamp::from_millis(1_767_225_600_000 + 2 * 86_400_000))),
            "ID            NAME    ROLE    CREATED  EXPIRES  ENDED\n\
             tok1          deploy  issuer  2d ago   -        -\n\
             4fK0pQz81LmN  deploy  issuer  2d ago   in 88d   1d ago\n"
        );
    }

    #[test]
    fn roles_have_one_name_each() {
        for role in Role::value_variants() {
            let name = role
                .to_possible_value()
                .map(|value| value.get_name().to_owned());
            let proto = admin::Role::from(*role) as i32;
            assert_eq!(name.as_deref(), Some(role_name(proto)));
        }
    }
}
