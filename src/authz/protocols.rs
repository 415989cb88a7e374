//! The `sec-websocket-protocol` header (RFC 6455, section 11.3.4): its items, and the header without
//! some of them.

/// Returns the items of a header, in order, without the spaces around them.
pub(super) fn items(header: &[u8]) -> impl Iterator<Item = &[u8]> {
    header.split(|b| *b == b',').map(<[u8]>::trim_ascii)
}

/// Joins the headers into one (RFC 9110, section 5.3), without the items that `is_removed` selects.
/// The result is empty if no item is left.
pub(super) fn without<'a>(
    headers: impl Iterator<Item = &'a [u8]>,
    is_removed: impl Fn(&[u8]) -> bool,
) -> Vec<u8> {
    let kept = headers
        .flat_map(items)
        .filter(|item| !item.is_empty() && !is_removed(item));
    kept.collect::<Vec<_>>().join(&b", "[..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_items_stay_in_their_order() {
        for (headers, rest) in [
            (&["key.K"][..], ""),
            (&["chat, key.K"], "chat"),
            (&["key.K,v2.chat , soap"], "v2.chat, soap"),
            (&["chat", "key.K", "soap"], "chat, soap"),
            (&[" , key.K,, chat,"], "chat"),
            (&["a.key.K, Key.K"], "a.key.K, Key.K"),
        ] {
            let headers = headers.iter().map(|header| header.as_bytes());
            let kept = without(headers, |item| item.starts_with(b"key."));
            assert_eq!(String::from_utf8_lossy(&kept), rest);
        }
    }
}
