//! For any bytes, and for any sealed content, a snapshot file is read without a panic. The content that is read can be
//! written, and is then read as the same.

use relatch::{
    key::Timestamp,
    keyring::Restored,
    snapshot::{
        SnapshotKey,
        origin::{FileId, Inode, Origin},
        read::{self, Contents},
        seal::{FrameKind, Header, Sealer},
        write,
    },
    wire::item,
};

/// The first byte selects what the others are. Even: the bytes of a file. Odd: the plaintexts of frames, each after its kind
/// and its length of two bytes.
pub(crate) fn holds(bytes: &[u8]) {
    let Some((mode, bytes)) = bytes.split_first() else {
        return;
    };
    let file = if mode % 2 == 0 {
        bytes.to_vec()
    } else {
        sealed(bytes)
    };
    let outline = read::outline(&file[..], file.len() as u64);
    if let Ok(contents) = read::read(&file[..], file.len() as u64, &key()) {
        let outline = outline.expect("what opens has an outline");
        // Without the key, a last frame that does not open is counted.
        assert!(contents.frames <= outline.frames);
        assert_same(&contents, &again(&contents));
    }
}

fn key() -> SnapshotKey {
    SnapshotKey::new([7; SnapshotKey::LEN])
}

fn sealer() -> Sealer {
    let header = Header {
        node: "edge-1".to_owned(),
        cluster: "default".to_owned(),
        written_at: Timestamp::from_millis(5_000),
        origin: Origin {
            id: FileId::new([1; FileId::LEN]),
            inode: Inode {
                device: 1,
                number: 2,
                born_ns: 3,
            },
            boot_clock: None,
        },
    };
    Sealer::new(&key(), &header).expect("the random source works")
}

/// Creates a file of the frames in the bytes.
fn sealed(mut bytes: &[u8]) -> Vec<u8> {
    const KINDS: [FrameKind; 4] = [
        FrameKind::Keyring,
        FrameKind::Entries,
        FrameKind::End,
        FrameKind::Appended,
    ];
    let mut sealer = sealer();
    let mut file = sealer.preamble().to_vec();
    while let [kind, high, low, rest @ ..] = bytes {
        let kind = KINDS[usize::from(*kind) % KINDS.len()];
        let len = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
        let (plaintext, behind) = rest.split_at(len);
        sealer.seal(kind, plaintext, &mut file);
        bytes = behind;
    }
    file
}

/// Writes `contents` to a file, and reads it again.
fn again(contents: &Contents) -> Contents {
    let mut file = Vec::new();
    let views = contents.keyrings.values().map(Restored::view);
    let (mut sealer, pulse) = (sealer(), &contents.pulse);
    write::write(&mut file, &mut sealer, views, pulse, contents.write).expect("memory takes it");
    read::read(&file[..], file.len() as u64, &key()).expect("we wrote it")
}

fn assert_same(one: &Contents, other: &Contents) {
    assert!(one.pulse == other.pulse);
    assert_eq!(one.write, other.write);
    assert!(one.keyrings.keys().eq(other.keyrings.keys()));
    for (one, other) in one.keyrings.values().zip(other.keyrings.values()) {
        let (one, other) = (one.view(), other.view());
        assert_eq!(
            (one.epoch(), one.revision()),
            (other.epoch(), other.revision())
        );
        assert_eq!(one.len(), other.len());
        for announced in one.announced() {
            let held = other.lookup(&announced.record.digest);
            let held = held.map(|held| item::encode_record(&held.to_record()));
            // Times before 1970 are read as the beginning of 1970, which is written as its first millisecond.
            assert_eq!(held, Some(item::encode_record(&announced.record)));
        }
    }
}
