//! The real binary, in a folder of its own, on a free port.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{self, Answer, Incoming, Request};

/// Longest a test waits for something that has to happen.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A running server; dropped, it is killed and its folder removed.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
    folder: tempfile::TempDir,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    text: Mutex<String>,
    grown: Condvar,
    /// The process has closed it: nothing more will come.
    ended: AtomicBool,
}

impl Log {
    /// Waits until `find` finds something in the log.
    fn wait<T>(&self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut text = self.text.lock().unwrap();
        loop {
            if let Some(found) = find(&text) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero() && !self.ended.load(SeqCst),
                "never logged: {what}\n{text}"
            );
            text = self.grown.wait_timeout(text, left).unwrap().0;
        }
    }
}

/// The golden checkpoint that most tests serve.
pub fn random_checkpoint() -> PathBuf {
    repository("tests/golden/ckpt_mha_int4")
}

impl Server {
    /// A ready server with the shipped configuration, serving the golden INT4 checkpoint: its weights are random, so
    /// that its answers never end by themselves, and its tokenizer is the published model's.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// A ready server with these keys changed.
    pub fn start_with(config: &str) -> Self {
        let server = Self::launch(config, |_| {});
        server.wait_ready();
        server
    }

    /// A ready server whose configuration says which model; with none, as a new user starts it: with the demo inside
    /// the binary.
    pub fn start_without_flag(config: &str) -> Self {
        let server = Self::launch_model(config, None, |_| {});
        server.wait_ready();
        server
    }

    /// A server that may not be ready yet; `prepare` fills its folder before it starts.
    pub fn launch(config: &str, prepare: impl FnOnce(&Path)) -> Self {
        Self::launch_model(config, Some(random_checkpoint()), prepare)
    }

    fn launch_model(config: &str, model: Option<PathBuf>, prepare: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        fs::write(folder.path().join("visor.toml"), config).expect("the config can be written");
        fs::create_dir(folder.path().join("visor-plugins")).expect("a folder can be made");
        prepare(folder.path());
        let mut command = Command::new(env!("CARGO_BIN_EXE_visor"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--config", "visor.toml"]);
        if let Some(model) = model {
            command.arg("--model").arg(model);
        }
        Self::spawn(command, folder)
    }

    /// Runs a command that serves, in a folder.
    pub fn spawn(command: Command, folder: tempfile::TempDir) -> Self {
        Self::spawn_read(command, folder, |_| true)
    }

    /// The same; nobody reads more of its log once `go_on` says no to a line, and nobody closes it.
    pub fn spawn_read(
        mut command: Command,
        folder: tempfile::TempDir,
        go_on: impl Fn(&str) -> bool + Send + 'static,
    ) -> Self {
        command
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let log = Arc::new(Log::default());
        let stderr = child.stderr.take().expect("stderr is piped");
        thread::spawn({
            let log = Arc::clone(&log);
            move || read_log(stderr, &log, go_on)
        });
        let address = log.wait("listening on", listening);
        Self {
            child,
            address,
            folder,
            log,
        }
    }

    /// Waits until `/ready` says 200.
    pub fn wait_ready(&self) {
        until("the server is ready", || {
            (self.get("/ready").status == 200).then_some(())
        });
    }

    /// Its folder: `visor.toml` and `visor-plugins/` are in it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Puts a file into the plugin folder the way editors do: whole, then renamed into place.
    pub fn install(&self, id: &str, bytes: &[u8]) {
        let folder = self.folder().join("visor-plugins");
        let half = folder.join(format!(".{id}.wasm.new"));
        fs::write(&half, bytes).expect("the plugin can be written");
        fs::rename(half, folder.join(format!("{id}.wasm"))).expect("the plugin can be renamed");
    }

    /// Takes a file out of the plugin folder.
    pub fn uninstall(&self, id: &str) {
        fs::remove_file(
            self.folder()
                .join("visor-plugins")
                .join(format!("{id}.wasm")),
        )
        .expect("it was there");
    }

    /// Waits until the log has a text, and returns what was logged so far.
    pub fn wait_logged(&self, text: &str) -> String {
        self.log
            .wait(text, |log| log.contains(text).then(|| log.to_owned()))
    }

    /// GET.
    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, b"")
    }

    /// Any method, with a JSON content type.
    pub fn send(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        client::send(self.address, &self.request(method, path, body))
    }

    /// As [`Self::send`], all of the body before anything of the answer is read.
    #[track_caller]
    pub fn send_all(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        client::send_all(self.address, &self.request(method, path, body))
    }

    /// A chat completion, read to its end.
    pub fn chat(&self, body: &Value) -> Answer {
        self.send("POST", "/v1/chat/completions", body.to_string().as_bytes())
    }

    /// A chat completion whose body is read by the caller.
    pub fn open_chat(&self, body: &Value) -> Incoming {
        let body = body.to_string();
        client::open(
            self.address,
            &self.request("POST", "/v1/chat/completions", body.as_bytes()),
        )
    }

    fn request<'a>(&self, method: &'a str, path: &'a str, body: &'a [u8]) -> Request<'a> {
        Request {
            method,
            path,
            headers: &[("content-type", "application/json")],
            body,
        }
    }

    /// `/stats`.
    pub fn stats(&self) -> Value {
        self.get("/stats").ok()
    }

    /// The sum of all series of a metric in `/metrics`.
    pub fn metric(&self, name: &str) -> f64 {
        let metrics = self.get("/metrics");
        let lines = metrics.text().lines().filter(|line| line.starts_with(name));
        lines
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Sends a signal by name (`TERM`, `INT`).
    pub fn signal(&self, name: &str) {
        let done = Command::new("kill")
            .arg(format!("-{name}"))
            .arg(self.child.id().to_string())
            .status();
        assert!(done.expect("kill runs").success());
    }

    /// Waits until the process ends.
    pub fn wait_exit(&mut self) -> ExitStatus {
        until("the server exits", || {
            self.child.try_wait().expect("the child can be waited for")
        })
    }

    /// What it logged so far.
    pub fn logged(&self) -> String {
        // A test that waited in vain left it poisoned, and wants to be told all the more.
        let text = self.log.text.lock();
        text.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- log of the server ---\n{}", self.logged());
        }
    }
}

fn read_log(stderr: impl Read, log: &Log, go_on: impl Fn(&str) -> bool) {
    let mut lines = BufReader::new(stderr).lines();
    while let Some(Ok(line)) = lines.next() {
        let more = go_on(&line);
        log.text.lock().unwrap().push_str(&(line + "\n"));
        log.grown.notify_all();
        if !more {
            std::mem::forget(lines);
            return;
        }
    }
    let _text = log.text.lock().unwrap();
    log.ended.store(true, SeqCst);
    log.grown.notify_all();
}

fn listening(log: &str) -> Option<SocketAddr> {
    let (_, rest) = log.split_once("listening on ")?;
    let (_, rest) = rest.split_once("://")?;
    let address: String = rest
        .chars()
        .take_while(|c| c.is_ascii_digit() || matches!(c, '.' | ':'))
        .collect();
    rest.contains('\n')
        .then(|| address.parse().expect("an address"))
}

/// Asks again and again until there is an answer.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A file of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

/// Bytes of a file of the repository.
pub fn fixture(path: &str) -> Vec<u8> {
    let path = repository(path);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A data URL.
pub fn data_url(kind: &str, bytes: &[u8]) -> String {
    use base64::Engine as _;
    format!(
        "data:{kind};base64,{}",
        base64::engine::general_purpose::STANDARD.encode(bytes)
    )
}

/// A user message of one text.
pub fn text(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

/// A user message of pictures and a question.
pub fn pictures(urls: &[String], question: &str) -> Value {
    let mut parts: Vec<Value> = urls
        .iter()
        .map(|url| json!({"type": "image_url", "image_url": {"url": url}}))
        .collect();
    parts.push(json!({"type": "text", "text": question}));
    json!({"role": "user", "content": parts})
}

/// The body of a short greedy chat.
pub fn chat(messages: &[Value]) -> Value {
    json!({"messages": messages, "max_tokens": 8, "temperature": 0})
}

/// A JSON object with further members.
pub fn with(mut base: Value, more: Value) -> Value {
    let (Value::Object(base_members), Value::Object(more)) = (&mut base, more) else {
        panic!("two objects");
    };
    base_members.extend(more);
    base
}

static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());

/// A server with the shipped configuration that tests running at the same time share; it ends with
/// the last of them. For tests that change nothing.
pub fn shared() -> Arc<Server> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(server) = shared.upgrade() {
        return server;
    }
    let server = Arc::new(Server::start());
    *shared = Arc::downgrade(&server);
    server
}
