use std::{
    fs as std_fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use tempfile::TempDir;

use super::*;
use crate::control::sink::testing::{Owner, Version};

struct Directory {
    temp: TempDir,
    sink: FileSink,
}

impl Directory {
    fn new() -> Self {
        let temp = tempfile::tempdir().expect("a temporary directory");
        // The path of a temporary directory may contain a link, which a sink refuses.
        let directory = temp.path().canonicalize().expect("it is there");
        let sink = FileSink::new(&FileSettings { directory });
        Self { temp, sink }
    }

    fn of(&self, owner: &Owner) -> PathBuf {
        let keyring = self.sink.directory.join(owner.keyring.as_str());
        keyring.join(owner.key_id.as_str())
    }

    fn read(&self, owner: &Owner, name: &str) -> Option<String> {
        std_fs::read_to_string(self.of(owner).join(name)).ok()
    }

    fn names(&self, owner: &Owner) -> Vec<String> {
        let entries = std_fs::read_dir(self.of(owner)).expect("it is there");
        let mut names: Vec<String> = entries
            .map(|entry| entry.expect("an entry").file_name())
            .map(|name| name.into_string().expect("ASCII"))
            .collect();
        names.sort();
        names
    }

    fn place(&self, owner: &Owner) -> KeyDirectory {
        KeyDirectory::open(&self.sink.directory, &owner.keyring, owner.key_id)
            .expect("it can be opened")
    }

    async fn deliver(&self, version: &Version<'_>) -> Result<(), FileError> {
        self.sink.deliver(&version.delivery()).await
    }

    async fn refusal(&self, version: &Version<'_>) -> String {
        let error = self.deliver(version).await.expect_err("it is refused");
        let text = format!("{error} {error:?}");
        version.assert_absent(&text);
        error.to_string()
    }
}

fn mode(path: &Path) -> u32 {
    let found = std_fs::symlink_metadata(path).expect("it is there");
    found.mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    std_fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("it is ours");
}

#[tokio::test]
async fn the_old_secret_moves_to_previous() {
    let (owner, directory) = (Owner::new(), Directory::new());
    let [one, two, three] = [1, 2, 3].map(|number| owner.version(number));
    directory.deliver(&one).await.expect("it is delivered");
    assert_eq!(directory.names(&owner), ["current"]);
    for (old, new) in [(&one, &two), (&two, &three)] {
        directory.deliver(new).await.expect("it is delivered");
        assert_eq!(
            directory.read(&owner, "current").as_deref(),
            Some(new.secret.expose())
        );
        assert_eq!(
            directory.read(&owner, "previous").as_deref(),
            Some(old.secret.expose())
        );
    }
    assert_eq!(directory.names(&owner), ["current", "previous"]);
}

#[tokio::test]
async fn only_the_owner_can_read() {
    let (owner, directory) = (Owner::new(), Directory::new());
    for number in [1, 2] {
        let version = owner.version(number);
        directory.deliver(&version).await.expect("it is delivered");
    }
    let key = directory.of(&owner);
    assert_eq!(mode(&key), 0o700);
    assert_eq!(mode(key.parent().expect("the keyring's")), 0o700);
    assert_eq!(mode(&key.join("current")), 0o600);
    assert_eq!(mode(&key.join("previous")), 0o600);
}

#[tokio::test]
async fn the_same_version_again_changes_nothing() {
    let (owner, directory) = (Owner::new(), Directory::new());
    let [one, two] = [1, 2].map(|number| owner.version(number));
    directory.deliver(&one).await.expect("it is delivered");
    for _ in 0..3 {
        directory.deliver(&two).await.expect("it is delivered");
        assert_eq!(
            directory.read(&owner, "current").as_deref(),
            Some(two.secret.expose())
        );
        assert_eq!(
            directory.read(&owner, "previous").as_deref(),
            Some(one.secret.expose())
        );
    }
}

#[tokio::test]
async fn wherever_a_delivery_ends_the_next_one_completes_it() {
    let owner = Owner::new();
    let [one, two] = [1, 2].map(|number| owner.version(number));
    for done in 0..=DeliveryStep::ALL.len() {
        let directory = Directory::new();
        directory.deliver(&one).await.expect("it is delivered");
        let place = directory.place(&owner);
        let contents = Contents {
            old: place.read(CURRENT).expect("readable"),
            new: Zeroizing::new(two.secret.expose().as_bytes().to_vec()),
        };
        for step in DeliveryStep::ALL.into_iter().take(done) {
            place.run(step, &contents).expect("the step works");
        }
        // Half a file of the interrupted step.
        let half = &two.secret.expose()[..10];
        let unfinished = if done < 2 { PREVIOUS_NEW } else { CURRENT_NEW };
        std_fs::write(directory.of(&owner).join(unfinished), half).expect("it is ours");
        drop(place);

        let current = directory.read(&owner, "current").expect("never absent");
        let expected = if done == DeliveryStep::ALL.len() {
            &two
        } else {
            &one
        };
        assert_eq!(current, expected.secret.expose(), "after {done} steps");

        directory.deliver(&two).await.expect("it is delivered");
        assert_eq!(
            directory.read(&owner, "current").as_deref(),
            Some(two.secret.expose())
        );
        assert_eq!(
            directory.read(&owner, "previous").as_deref(),
            Some(one.secret.expose())
        );
        assert_eq!(directory.names(&owner), ["current", "previous"]);
    }
}

#[tokio::test]
async fn a_reader_never_sees_less_than_a_whole_secret() {
    let (owner, directory) = (Owner::new(), Directory::new());
    let versions: Vec<Version<'_>> = (1..=40).map(|number| owner.version(number)).collect();
    let known: Vec<&str> = versions.iter().map(|one| one.secret.expose()).collect();
    directory.deliver(&versions[0]).await.expect("delivered");
    directory.deliver(&versions[1]).await.expect("delivered");
    let (current, previous) = (
        directory.of(&owner).join("current"),
        directory.of(&owner).join("previous"),
    );
    let done = AtomicBool::new(false);
    let reads = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut reads = 0_u32;
            while !done.load(Ordering::Relaxed) {
                for path in [&current, &previous] {
                    let text = std_fs::read_to_string(path).expect("it is never absent");
                    assert!(known.contains(&text.as_str()), "a torn {}", path.display());
                }
                reads += 1;
            }
            reads
        });
        for version in &versions[2..] {
            let place = directory.place(&owner);
            let new = Zeroizing::new(version.secret.expose().as_bytes().to_vec());
            place.write(new).expect("it is written");
        }
        done.store(true, Ordering::Relaxed);
        reader.join().expect("the reader saw whole secrets only")
    });
    assert!(reads > 0, "nothing was read meanwhile");
}

#[tokio::test]
async fn links_are_not_followed() {
    let (owner, directory) = (Owner::new(), Directory::new());
    let version = owner.version(1);
    let elsewhere = tempfile::tempdir().expect("a temporary directory");
    let keyring = directory.sink.directory.join(owner.keyring.as_str());

    symlink(elsewhere.path(), &keyring).expect("a link");
    let refusal = directory.refusal(&version).await;
    assert!(refusal.contains("payments is a symbolic link"), "{refusal}");
    std_fs::remove_file(&keyring).expect("it is ours");

    std_fs::create_dir(&keyring).expect("a directory");
    set_mode(&keyring, 0o700);
    symlink(elsewhere.path(), directory.of(&owner)).expect("a link");
    let refusal = directory.refusal(&version).await;
    assert!(refusal.contains("is a symbolic link"), "{refusal}");
    std_fs::remove_file(directory.of(&owner)).expect("it is ours");

    directory.deliver(&version).await.expect("it is delivered");
    let current = directory.of(&owner).join("current");
    std_fs::remove_file(&current).expect("it is ours");
    symlink(elsewhere.path().join("stolen"), &current).expect("a link");
    let refusal = directory.refusal(&version).await;
    assert!(refusal.contains("current is a symbolic link"), "{refusal}");
    std_fs::remove_file(&current).expect("it is ours");

    // A link in the place of a new file is removed, and its target stays.
    directory.deliver(&version).await.expect("it is delivered");
    symlink(
        elsewhere.path().join("stolen"),
        directory.of(&owner).join(CURRENT_NEW),
    )
    .expect("a link");
    directory
        .deliver(&owner.version(2))
        .await
        .expect("it is delivered");
    let stolen = std_fs::read_dir(elsewhere.path()).expect("readable");
    assert_eq!(stolen.count(), 0, "a secret was written through a link");

    // The same holds for a link in the path of the directory.
    let link = directory.temp.path().join("link");
    symlink(directory.temp.path(), &link).expect("a link");
    let sink = FileSink::new(&FileSettings {
        directory: link.join("payments"),
    });
    let error = sink.deliver(&version.delivery()).await;
    assert!(matches!(error, Err(FileError::Symlink(_))), "{error:?}");
}

#[tokio::test]
async fn a_directory_that_others_can_write_to_is_refused() {
    let (owner, directory) = (Owner::new(), Directory::new());
    let version = owner.version(1);
    let base = directory.sink.directory.clone();
    for mode in [0o770, 0o702, 0o1777] {
        set_mode(&base, mode);
        let refusal = directory.refusal(&version).await;
        let expected = format!("other users can write to {}", base.display());
        assert!(refusal.starts_with(&expected), "{refusal}");
    }
    set_mode(&base, 0o755);
    directory.deliver(&version).await.expect("it is delivered");
    set_mode(&directory.of(&owner), 0o720);
    let refusal = directory.refusal(&version).await;
    assert!(
        refusal.contains("(mode 720): run `chmod go-w` on it"),
        "{refusal}"
    );
}

#[tokio::test]
async fn what_is_not_there_or_of_another_kind_is_named() {
    let (owner, directory) = (Owner::new(), Directory::new());
    let version = owner.version(1);
    let missing = directory.sink.directory.join("missing");
    let sink = FileSink::new(&FileSettings { directory: missing });
    let error = sink.deliver(&version.delivery()).await;
    assert!(matches!(error, Err(FileError::Missing(_))), "{error:?}");

    let keyring = directory.sink.directory.join(owner.keyring.as_str());
    std_fs::write(&keyring, "").expect("writable");
    let refusal = directory.refusal(&version).await;
    assert!(refusal.contains("payments is not a directory"), "{refusal}");
    std_fs::remove_file(&keyring).expect("it is ours");

    directory.deliver(&version).await.expect("it is delivered");
    let current = directory.of(&owner).join("current");
    std_fs::remove_file(&current).expect("it is ours");
    let flags = Mode::RUSR | Mode::WUSR;
    fs::mkfifoat(fs::CWD, &current, flags).expect("a pipe");
    let refusal = directory.refusal(&version).await;
    assert!(refusal.contains("current is not a file"), "{refusal}");
}

#[test]
fn what_belongs_to_another_user_is_refused() {
    let user = geteuid().as_raw();
    let path = Path::new("/run/keys");
    assert!(check_owner(user, path).is_ok());
    let error = check_owner(user + 1, path).expect_err("of another user");
    assert_eq!(
        error.to_string(),
        format!(
            "/run/keys belongs to user {}, but the control plane runs as user {user}: run `chown {user}` on it",
            user + 1
        )
    );
}

#[test]
fn a_full_disk_is_told_apart() {
    for error in [Errno::NOSPC, Errno::DQUOT] {
        let error = failed("write", Path::new("/run/keys"))(error).to_string();
        assert_eq!(
            error,
            "there is no space left for /run/keys: free some space"
        );
    }
}

#[tokio::test]
async fn two_deliveries_do_not_mix() {
    let (owner, directory) = (Owner::new(), Directory::new());
    let version = owner.version(1);
    let held = directory.place(&owner);
    let refusal = directory.refusal(&version).await;
    let busy = "another delivery is writing to ";
    assert!(refusal.starts_with(busy), "{refusal}");
    assert!(refusal.ends_with(": try again"), "{refusal}");
    drop(held);
    directory.deliver(&version).await.expect("it is delivered");
}
