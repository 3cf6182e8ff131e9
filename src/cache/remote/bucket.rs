//! The only file that speaks to object stores: S3, Google, Azure, HTTP, a folder.
//!
//! What is asynchronous ends here: its functions block, and two threads of one small runtime move
//! the bytes. It knows names and bytes; what they mean stands in `cache/remote`.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, SystemTime};

use futures_util::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, Error, GetResult, GetResultPayload, ObjectStore, ObjectStoreExt,
    PutMode, PutOptions, PutPayload, RetryConfig, WriteMultipart,
};
use reqwest::Url;
use tokio::runtime::{Builder, Runtime};

use super::{Listed, Put, Trouble};
use crate::interrupt;

/// Larger files are sent in parts of this size; no store shows them before the last part is there.
const PART: usize = 8 << 20;
/// Parts of one file that are under way at once.
const PARTS_AT_ONCE: usize = 4;
/// The largest file that is held in memory for a server that takes no parts.
const WHOLE: u64 = 256 << 20;
/// A server that says nothing for so long is taken for one that does not answer.
const SILENCE: Duration = Duration::from_secs(60);
/// A server that does not take a connection for so long likewise.
const CONNECT: Duration = Duration::from_secs(5);

/// How often a thing is sent again that the library sends once.
const MORE_TRIES: usize = 3;
/// After what wait.
const PAUSE: Duration = Duration::from_millis(300);

/// One store, from a prefix on.
#[derive(Debug)]
pub(super) struct Bucket {
    runtime: Runtime,
    store: Arc<dyn ObjectStore>,
    prefix: Path,
}

/// Tried again after these waits: a server error, a broken connection, a silence.
fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(4),
            base: 2.0,
        },
        max_retries: 5,
        retry_timeout: Duration::from_secs(45),
    }
}

/// No limit for a whole transfer, which may be large, but for every silence in it.
fn client(plain_http: bool) -> ClientOptions {
    ClientOptions::new()
        .with_timeout_disabled()
        .with_connect_timeout(CONNECT)
        .with_read_timeout(SILENCE)
        .with_allow_http(plain_http)
}

/// Whether a variable names a server without TLS, or allows one.
fn allows_http(endpoints: &[&str], switch: &str) -> bool {
    let set = |name: &str| std::env::var(name).unwrap_or_default().to_ascii_lowercase();
    endpoints.iter().any(|name| set(name).starts_with("http://"))
        || matches!(set(switch).as_str(), "1" | "true" | "yes" | "on")
}

/// Whether there is somebody to ask for credentials: variables, or the cloud's own machine, which
/// is asked for a connection alone. Without that every request would wait for it in vain.
fn has_amazon_credentials() -> bool {
    const NAMES: [&str; 5] = [
        "AWS_ACCESS_KEY_ID",
        "AWS_SKIP_SIGNATURE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ];
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let of_machine = || {
        if set("AWS_METADATA_ENDPOINT") {
            return true;
        }
        let machine = SocketAddr::from(([169, 254, 169, 254], 80));
        TcpStream::connect_timeout(&machine, Duration::from_secs(1)).is_ok()
    };
    NAMES.into_iter().any(set) || of_machine()
}

impl Bucket {
    /// The store that a URL names. Nothing is asked of it yet.
    pub fn open(url: &str, anonymous: bool) -> Result<Bucket, String> {
        let usual = "write s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, \
                     https://SERVER/PATH or file:///FOLDER";
        let parsed = Url::parse(url).map_err(|error| format!("{error}; {usual}"))?;
        if matches!(parsed.scheme(), "s3" | "s3a" | "gs" | "az") && parsed.host().is_none() {
            return Err(format!("it names no bucket; {usual}"));
        }
        let said = |error: Error| in_words(&error);
        let prefix = || Path::from_url_path(parsed.path()).map_err(|error| error.to_string());
        // What TLS computes with; a second call in one process changes nothing.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (store, prefix): (Arc<dyn ObjectStore>, Path) = match parsed.scheme() {
            "file" => {
                let folder = parsed
                    .to_file_path()
                    .map_err(|()| "a folder is named as `file:///absolute/path`".to_owned())?;
                if !folder.is_dir() {
                    let place = folder.display();
                    return Err(format!("`{place}` is no folder; make it, or mount it"));
                }
                let store = LocalFileSystem::new_with_prefix(folder).map_err(said)?;
                (Arc::new(store), Path::default())
            }
            "s3" | "s3a" => {
                if !anonymous && !has_amazon_credentials() {
                    return Err("no credentials were found: set AWS_ACCESS_KEY_ID and \
                         AWS_SECRET_ACCESS_KEY, or `anonymous = true` in `[cache]` for a bucket \
                         that everybody may read"
                        .to_owned());
                }
                let endpoints = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"];
                let http = allows_http(&endpoints, "AWS_ALLOW_HTTP");
                let mut builder = AmazonS3Builder::from_env().with_url(url);
                if anonymous {
                    builder = builder.with_skip_signature(true);
                }
                let store = builder.with_client_options(client(http)).with_retry(retries()).build();
                (Arc::new(store.map_err(said)?), prefix()?)
            }
            "gs" => {
                let http = allows_http(&["GOOGLE_BASE_URL"], "GOOGLE_ALLOW_HTTP");
                let mut builder = GoogleCloudStorageBuilder::from_env().with_url(url);
                if let Ok(base) = std::env::var("GOOGLE_BASE_URL") {
                    builder = builder.with_base_url(&base);
                }
                if anonymous {
                    builder = builder.with_skip_signature(true);
                }
                let store = builder.with_client_options(client(http)).with_retry(retries()).build();
                (Arc::new(store.map_err(said)?), prefix()?)
            }
            "az" | "azure" | "abfs" | "abfss" => {
                let http = allows_http(&["AZURE_ENDPOINT"], "AZURE_ALLOW_HTTP");
                let mut builder = MicrosoftAzureBuilder::from_env().with_url(url);
                if anonymous {
                    builder = builder.with_skip_signature(true);
                }
                let store = builder.with_client_options(client(http)).with_retry(retries()).build();
                (Arc::new(store.map_err(said)?), prefix()?)
            }
            "http" | "https" => {
                let http = parsed.scheme() == "http";
                let server = &parsed.as_str()[..url_before_path(&parsed)];
                let builder = HttpBuilder::new().with_url(server);
                let store = builder.with_client_options(client(http)).with_retry(retries()).build();
                (Arc::new(store.map_err(said)?), prefix()?)
            }
            other => {
                return Err(format!(
                    "`{other}` is no kind of store; give s3://BUCKET/PATH, gs://BUCKET/PATH, \
                     az://CONTAINER/PATH, https://HOST/PATH or file:///PATH"
                ));
            }
        };
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .thread_name("remote-cache")
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Bucket { runtime, store, prefix })
    }

    fn place(&self, name: &str) -> Path {
        self.prefix.parts().chain(Path::from(name).parts()).collect()
    }

    /// A small object and when it was written; nothing if it is not there.
    pub fn get(&self, name: &str, most: u64) -> Result<Option<(Vec<u8>, SystemTime)>, Trouble> {
        self.runtime.block_on(async {
            let Some(found) = there(self.store.get(&self.place(name)).await)? else {
                return Ok(None);
            };
            let written = SystemTime::from(found.meta.last_modified);
            if found.meta.size > most {
                let size = found.meta.size;
                return Err(Trouble::Wrong(format!("it has {size} bytes, more than any record")));
            }
            let bytes = found.bytes().await.map_err(|error| cut(&error))?;
            Ok(Some((bytes.to_vec(), written)))
        })
    }

    /// Writes an object to a file while it arrives, and gives its hash; nothing if it is not there.
    pub fn fetch(&self, name: &str, to: &mut File) -> Result<Option<blake3::Hash>, Trouble> {
        let Some(found) = there(self.runtime.block_on(self.store.get(&self.place(name))))? else {
            return Ok(None);
        };
        let mut hasher = blake3::Hasher::new();
        let GetResult { payload, .. } = found;
        match payload {
            GetResultPayload::File(mut file, _) => copy_hashed(&mut file, to, &mut hasher)?,
            GetResultPayload::Stream(mut stream) => self.runtime.block_on(async {
                while let Some(chunk) = stream.try_next().await.map_err(|error| cut(&error))? {
                    if interrupt::requested() {
                        return Err(Trouble::Stopped);
                    }
                    to.write_all(&chunk).map_err(|error| Trouble::Here(error.to_string()))?;
                    hasher.update(&chunk);
                }
                Ok(())
            })?,
        }
        Ok(Some(hasher.finalize()))
    }

    /// The size of an object; nothing if it is not there.
    pub fn size(&self, name: &str) -> Result<Option<u64>, Trouble> {
        let found = self.runtime.block_on(self.store.head(&self.place(name)));
        Ok(there(found)?.map(|meta| meta.size))
    }

    /// Puts a small object there whole; with `new` only where there is none, as far as the store
    /// can hold to that.
    pub fn put(&self, name: &str, bytes: &[u8], new: bool) -> Result<Put, Trouble> {
        let place = self.place(name);
        let put = |mode: PutMode| {
            let payload = PutPayload::from(bytes.to_vec());
            let options = PutOptions::from(mode);
            self.runtime.block_on(self.store.put_opts(&place, payload, options))
        };
        let mut done = put(if new { PutMode::Create } else { PutMode::Overwrite });
        if new {
            // What is to be new is sent once by the library, which cannot know that it is the
            // same: where an answer is lost, the next try finds it there.
            for _ in 0..MORE_TRIES {
                match &done {
                    Err(error) if !interrupt::requested() && is_for_a_moment(error) => {
                        std::thread::sleep(PAUSE);
                        done = put(PutMode::Create);
                    }
                    _ => break,
                }
            }
            if let Err(error) = &done
                && is_beyond_it(error)
            {
                done = put(PutMode::Overwrite);
            }
        }
        match done {
            Ok(_) => Ok(Put::Written),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) if new => Ok(Put::Exists),
            Err(error) => Err(trouble(&error)),
        }
    }

    /// Puts a file there, whole or not at all.
    pub fn put_file(&self, name: &str, path: &FilePath) -> Result<(), Trouble> {
        let here = |error: std::io::Error| Trouble::Here(error.to_string());
        let mut file = File::open(path).map_err(here)?;
        let size = file.metadata().map_err(here)?.len();
        if size <= PART as u64 {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(here)?;
            return self.put(name, &bytes, false).map(drop);
        }
        let place = self.place(name);
        let sent = self.runtime.block_on(async {
            let upload = self.store.put_multipart(&place).await?;
            let mut upload = WriteMultipart::new_with_chunk_size(upload, PART);
            let mut buffer = vec![0; PART];
            loop {
                let read = match file.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(read) if !interrupt::requested() => read,
                    Ok(_) => {
                        upload.abort().await?;
                        return Ok(Err(Trouble::Stopped));
                    }
                    Err(error) => {
                        upload.abort().await?;
                        return Ok(Err(here(error)));
                    }
                };
                if let Err(error) = upload.wait_for_capacity(PARTS_AT_ONCE).await {
                    // What failed is what is told.
                    let _ = upload.abort().await;
                    return Err(error);
                }
                upload.write(&buffer[..read]);
            }
            upload.finish().await.map(|_| Ok(()))
        });
        match sent {
            Ok(sent) => sent,
            // Such as HTTP: it takes whole files only.
            Err(Error::NotImplemented { .. } | Error::NotSupported { .. }) => {
                if size > WHOLE {
                    return Err(Trouble::Here(format!(
                        "it has {size} bytes, and a server that takes files whole gets none above \
                         {WHOLE}"
                    )));
                }
                let bytes = std::fs::read(path).map_err(here)?;
                self.put(name, &bytes, false).map(drop)
            }
            Err(error) => Err(trouble(&error)),
        }
    }

    /// All objects below a name.
    pub fn list(&self, below: &str) -> Result<Vec<Listed>, Trouble> {
        let place = self.place(below);
        let found = self.runtime.block_on(self.store.list(Some(&place)).try_collect::<Vec<_>>());
        let found = found.map_err(|error| trouble(&error))?;
        let own = self.prefix.as_ref().len() + usize::from(!self.prefix.as_ref().is_empty());
        let listed = found.into_iter().filter_map(|meta| {
            Some(Listed {
                name: meta.location.as_ref().get(own..)?.to_owned(),
                size: meta.size,
                written: SystemTime::from(meta.last_modified),
            })
        });
        Ok(listed.collect())
    }

    /// Removes an object; one that is not there is removed already.
    pub fn remove(&self, name: &str) -> Result<(), Trouble> {
        there(self.runtime.block_on(self.store.delete(&self.place(name)))).map(drop)
    }
}

/// How long a URL is before its path.
fn url_before_path(url: &Url) -> usize {
    let query = url.query().map_or(0, |query| query.len() + 1);
    let fragment = url.fragment().map_or(0, |fragment| fragment.len() + 1);
    url.as_str().len() - url.path().len() - query - fragment
}

/// Copies a file of a folder, and hashes beside that what was written: the kernel moves the bytes,
/// and what is hashed is read back while the caches still hold it.
fn copy_hashed(from: &mut File, to: &mut File, hasher: &mut blake3::Hasher) -> Result<(), Trouble> {
    // What the kernel moves at a time.
    const CHUNK: u64 = 2 << 20;
    let here = |error: std::io::Error| Trouble::Here(error.to_string());
    let cut = |error: std::io::Error| Trouble::Cut(error.to_string());
    let size = from.metadata().map_err(cut)?.len();
    let written = to.try_clone().map_err(here)?;
    let mut copy = |tell: &mut dyn FnMut(u64) -> Result<(), Trouble>| {
        let mut end = 0;
        loop {
            let moved = std::io::copy(&mut Read::by_ref(from).take(CHUNK), to);
            // Of the two files the reader's failures are those of the store.
            match moved
                .map_err(|error| if is_of_disk(&error) { here(error) } else { cut(error) })?
            {
                0 => return Ok(()),
                moved => end += moved,
            }
            if interrupt::requested() {
                return Err(Trouble::Stopped);
            }
            tell(end)?;
        }
    };
    let mut reader = Hashed { file: &written, buffer: vec![0; 256 << 10], at: 0, hasher };
    if size <= 2 * CHUNK {
        return copy(&mut |end| reader.up_to(end).map_err(here));
    }
    std::thread::scope(|scope| {
        let (give, ends) = channel::<u64>();
        let hashing = std::thread::Builder::new()
            .spawn_scoped(scope, move || ends.iter().try_for_each(|end| reader.up_to(end)))
            .map_err(|error| Trouble::Here(crate::text::no_threads(1, &error)))?;
        // It goes on until this end is dropped.
        copy(&mut move |end| {
            // Where it has ended early, its error is told below.
            let _ = give.send(end);
            Ok(())
        })?;
        match hashing.join() {
            Ok(hashed) => hashed.map_err(here),
            Err(bug) => std::panic::resume_unwind(bug),
        }
    })
}

/// Whether a failure is of this machine's disk, which is written.
fn is_of_disk(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// What of a file is hashed while it is written.
struct Hashed<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    at: u64,
    hasher: &'a mut blake3::Hasher,
}

impl Hashed<'_> {
    /// Hashes what has been written up to here.
    fn up_to(&mut self, end: u64) -> std::io::Result<()> {
        while self.at < end {
            let want = usize::try_from(end - self.at).unwrap_or(usize::MAX).min(self.buffer.len());
            let part = &mut self.buffer[..want];
            self.file.read_exact_at(part, self.at)?;
            self.hasher.update(part);
            self.at += want as u64;
        }
        Ok(())
    }
}

/// Whether the same may well be done a moment later.
fn is_for_a_moment(error: &Error) -> bool {
    matches!(error, Error::Generic { .. })
        && matches!(trouble(error), Trouble::Down(_))
        && !is_beyond_it(error)
}

/// Whether a store does not know how to hold to what was asked of it.
fn is_beyond_it(error: &Error) -> bool {
    match error {
        Error::NotImplemented { .. } | Error::NotSupported { .. } => true,
        // The code of S3's answer 501.
        error => in_words(error).contains("<Code>NotImplemented</Code>"),
    }
}

/// What was found, or nothing where there is nothing.
fn there<T>(found: Result<T, Error>) -> Result<Option<T>, Trouble> {
    match found {
        Ok(found) => Ok(Some(found)),
        // A bucket that is not there is no empty bucket.
        Err(error @ Error::NotFound { .. }) if !in_words(&error).contains("NoSuchBucket") => {
            Ok(None)
        }
        Err(error) => Err(trouble(&error)),
    }
}

/// A body that ended before its end, or could not be read.
fn cut(error: &Error) -> Trouble {
    match trouble(error) {
        Trouble::Down(text) => Trouble::Cut(text),
        other => other,
    }
}

/// What an error means for whoever asked.
fn trouble(error: &Error) -> Trouble {
    let text = in_words(error);
    // What servers say with other numbers than 401 and 403.
    const REFUSALS: [&str; 11] = [
        "ExpiredToken",
        "InvalidToken",
        "NoSuchBucket",
        "ContainerNotFound",
        "AuthenticationFailed",
        "InvalidBucketName",
        "PermanentRedirect",
        "BareRedirect",
        "redirect without LOCATION",
        // A folder.
        "Permission denied",
        "Read-only file system",
    ];
    match error {
        Error::PermissionDenied { .. }
        | Error::Unauthenticated { .. }
        | Error::NotFound { .. }
        | Error::InvalidPath { .. } => Trouble::Refused(text),
        Error::NotImplemented { .. } | Error::NotSupported { .. } => Trouble::Refused(text),
        _ if REFUSALS.iter().any(|word| text.contains(word)) => Trouble::Refused(text),
        // Who is asked for credentials where none are set: the cloud's own machines alone know it.
        _ if ["169.254.169.254", "metadata.google.internal", "InstanceMetadata"]
            .iter()
            .any(|word| text.contains(word)) =>
        {
            Trouble::Refused(format!("no credentials were found ({text})"))
        }
        _ => Trouble::Down(text),
    }
}

/// The error with what it stands on, in one line.
fn in_words(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(deeper) = source {
        let more = deeper.to_string();
        if !text.contains(&more) {
            text += &format!(": {more}");
        }
        source = deeper.source();
    }
    const MOST: usize = 400;
    let text = crate::text::one_line(&text);
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
