//! Where the address of the client is found, in the configuration file of a sidecar.

use ::http::HeaderName;
use ipnet::IpNet;
use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use super::{
    credential::Placed,
    reader::{Findings, Text},
    value,
};
use crate::{
    authz::{
        AddressSource, Hops, IdentityHeaders, TrustedProxies,
        client_address::FORWARDED_FOR,
        settings::{folds_to, parse_address_header},
    },
    key::parse_block,
};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawClientAddress {
    from: Option<Text>,
    trusted: Option<Spanned<Vec<Text>>>,
    hops: Option<Text>,
    envoy_appends: Option<Text>,
}

const FIELD: &str = "client_address";

impl RawClientAddress {
    /// The source of the address; the default if the file has none. None if it is wrong, which is then noted.
    pub(super) fn into_source(
        raw: Option<Spanned<Self>>,
        credentials: &[Placed],
        identity: &IdentityHeaders,
        found: &mut Findings,
    ) -> Option<AddressSource> {
        let Some(Spanned {
            value: raw,
            referenced: place,
            ..
        }) = raw
        else {
            return Some(AddressSource::default());
        };
        let name = found.required(
            place,
            format_args!("{FIELD}.from"),
            "name the header with the address, such as x-forwarded-for",
            raw.from.as_ref(),
            parse_address_header,
        );
        if let (Some(name), Some(text)) = (&name, &raw.from) {
            refuse_other_use(name, text.referenced, credentials, identity, found);
        }
        let is_list = name.as_ref().is_none_or(|name| name == FORWARDED_FOR);
        let hops = hops(&raw, is_list, found);
        let trusted = trusted(place, raw.trusted, is_list && raw.hops.is_none(), found);
        let (name, trusted) = (name?, trusted?);
        Some(match hops {
            Some(hops) => AddressSource::Hops { trusted, hops },
            None if is_list => AddressSource::ForwardedFor { trusted },
            None => AddressSource::Header { trusted, name },
        })
    }
}

/// Notes a header that is also searched for a credential, or that names the caller.
fn refuse_other_use(
    name: &HeaderName,
    at: Location,
    credentials: &[Placed],
    identity: &IdentityHeaders,
    found: &mut Findings,
) {
    let field = format_args!("{FIELD}.from");
    if credentials
        .iter()
        .any(|placed| placed.source.folds_to(name))
    {
        found.note(
            at,
            field,
            format_args!("`{name}` is also searched for a credential, use another header"),
        );
    }
    if identity.names().any(|other| folds_to(other.as_ref(), name)) {
        found.note(
            at,
            field,
            format_args!("`{name}` is also an identity header, use another header"),
        );
    }
}

/// The number of proxies. None if it is not given, or if it is wrong, which is then noted.
fn hops(raw: &RawClientAddress, is_list: bool, found: &mut Findings) -> Option<Hops> {
    let field = |name: &str| format!("{FIELD}.{name}");
    let (hops, envoy_appends) = (raw.hops.as_ref(), raw.envoy_appends.as_ref());
    if !is_list && let Some(text) = hops.or(envoy_appends) {
        let name = hops.map_or("envoy_appends", |_| "hops");
        found.note(
            text.referenced,
            field(name),
            format_args!("can be used only with `from: {FORWARDED_FOR}`, remove it"),
        );
        return None;
    }
    let Some(text) = hops else {
        if let Some(text) = envoy_appends {
            found.note(
                text.referenced,
                field("envoy_appends"),
                "has an effect only with `hops`, remove it",
            );
        }
        return None;
    };
    let count = found.parse(field("hops"), Some(text), count);
    let envoy_appends = found.required(
        text.referenced,
        field("envoy_appends"),
        "say whether Envoy appends its peer to the header before it asks: true with `use_remote_address: true`, else false",
        envoy_appends,
        value::boolean,
    );
    Some(Hops {
        count: count?,
        envoy_appends: envoy_appends?,
    })
}

fn count(text: &str) -> Result<u8, String> {
    text.parse()
        .ok()
        .filter(|count| (1..=Hops::MAX).contains(count))
        .ok_or_else(|| {
            format!(
                "use the number of proxies before Envoy, from 1 to {}",
                Hops::MAX
            )
        })
}

/// The trusted proxies. `walks`: the address is the first that is not one of them. None if they are wrong, which is then
/// noted.
fn trusted(
    place: Location,
    raw: Option<Spanned<Vec<Text>>>,
    walks: bool,
    found: &mut Findings,
) -> Option<TrustedProxies> {
    let field = format!("{FIELD}.trusted");
    let place = raw.as_ref().map_or(place, |raw| raw.referenced);
    let Some(raw) = raw.filter(|raw| !raw.value.is_empty()) else {
        found.missing(
            place,
            field,
            "name the addresses of your proxies, such as [10.0.0.0/8]: a header of anybody else does not count",
        );
        return None;
    };
    found.bound(&field, &raw, TrustedProxies::MAX);
    let mut parse = |(at, text): (usize, &Text)| {
        found.parse(format_args!("{field}[{at}]"), Some(text), |text| {
            let block = parse_block(text).map_err(|error| error.to_string())?;
            if walks && block.prefix_len() == 0 {
                return Err(EVERYBODY.to_owned());
            }
            Ok(block)
        })
    };
    let blocks: Vec<Option<IpNet>> = raw.value.iter().enumerate().map(&mut parse).collect();
    let blocks: Option<Vec<IpNet>> = blocks.into_iter().collect();
    blocks.map(TrustedProxies::new)
}

const EVERYBODY: &str = "trusts every address, so that each client could choose its own: name the addresses of your proxies, or count them with `hops`";
