//! What everything but the model takes: from a request on the socket to the engine, and from the engine's tokens back to the socket.
//!
//! The model says what it is told to and notes when it was asked; the client is a bare socket. Asking and answering run through the
//! shipped plugins, one request at a time: `cargo bench -p visor --bench overhead`. Beyond the bars it fails.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench: a panic is its verdict, and its figures go to standard output"
)]

use std::hint::spin_loop;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use visor::Listeners;
use visor::config::Config;
use visor::http::connections::Listener;
use visor::wiring::House;
use visor_engine::{KvFigures, Model, ModelLoader, Part};
use visor_model::image::PixelValues;
use visor_model::{DeviceKind, ImageFeatures, KvBlock, ModelError, Prompt};

/// Requests of each kind, after some that are not counted.
const REQUESTS: usize = 300;
const UNCOUNTED: usize = 50;
/// Tokens of a stream.
const TOKENS: usize = 64;
/// Time between two tokens of a paced stream, so that each travels alone.
const PACE: Duration = Duration::from_millis(2);
/// Threads that are woken for a token that travels alone, one after the other: the request's own by the engine, and the client's.
const WOKEN: usize = 2;
/// Times that threads are woken for nothing, to know what that takes.
const WAKES: usize = 500;
/// A token on its way to the client.
const TOKEN_BYTES: usize = 219;
/// What may be added to a request of one token, and to each token of a stream that never waits. How long a token travels alone is told
/// and not judged, beside what waking [`WOKEN`] threads takes: that is the system's, and so is how cold everything is after [`PACE`].
const REQUEST_MAX: Duration = Duration::from_millis(1);
const TOKEN_MAX: Duration = Duration::from_micros(50);

/// When the model was asked and when it answered.
#[derive(Default)]
struct Marks {
    begun: Vec<Instant>,
    answered: Vec<Instant>,
}

#[derive(Clone, Default)]
struct Script {
    marks: Arc<Mutex<Marks>>,
    pace: Arc<Mutex<Duration>>,
    /// What it says, again and again.
    tokens: Vec<u32>,
    vocabulary: usize,
}

struct State {
    pending: usize,
    said: usize,
    generating: bool,
}

impl ModelLoader for Script {
    type Model = Self;

    fn load(&mut self, _: DeviceKind) -> Result<Self, ModelError> {
        Ok(self.clone())
    }
}

impl Model for Script {
    type State = State;
    type Features = ImageFeatures;
    type Pass = ();
    type Block = KvBlock;

    fn device(&self) -> DeviceKind {
        DeviceKind::Cpu
    }

    fn advance_image(
        &self,
        (): &mut (),
        _: &PixelValues,
        _: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<ImageFeatures>, ModelError> {
        Err(ModelError::Prompt("it sees nothing".into()))
    }

    fn features_bytes(features: &ImageFeatures) -> u64 {
        features.bytes()
    }

    fn begin(&self, prompt: &Prompt, _: &[u32]) -> Result<State, ModelError> {
        self.marks.lock().unwrap().begun.push(Instant::now());
        Ok(State {
            pending: prompt.ids.len(),
            said: 0,
            generating: false,
        })
    }

    fn set_features(
        &self,
        _: &mut State,
        _: usize,
        _: Arc<ImageFeatures>,
    ) -> Result<(), ModelError> {
        Ok(())
    }

    fn push(&self, state: &mut State, _: u32) -> Result<(), ModelError> {
        state.pending += 1;
        state.generating = true;
        Ok(())
    }

    fn pending(state: &State) -> usize {
        state.pending
    }

    fn kv(&self) -> KvFigures {
        KvFigures {
            block_positions: 64,
            block_bytes: 1,
            blocks_used: 0,
            blocks_max: 1 << 20,
        }
    }

    fn set_kv_blocks_max(&self, _: usize) {}

    fn reserve(&self, _: &mut State, _: usize) -> Result<(), ModelError> {
        Ok(())
    }

    fn share(_: &State) -> &[Arc<KvBlock>] {
        &[]
    }

    fn adopt(&self, _: &mut State, _: &[Arc<KvBlock>], _: usize) -> Result<(), ModelError> {
        Ok(())
    }

    fn is_long(&self, _: usize) -> bool {
        false
    }

    fn step(
        &self,
        parts: &mut [Part<'_, State>],
        _: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Option<Vec<f32>>>, ModelError> {
        let pace = *self.pace.lock().unwrap();
        if parts.iter().any(|part| part.state.generating) && !pace.is_zero() {
            thread::sleep(pace);
        }
        let say = |part: &mut Part<'_, State>| {
            let state = &mut *part.state;
            state.pending -= state.pending.min(part.positions_max);
            (state.pending == 0).then(|| {
                let mut logits = vec![0.0; self.vocabulary];
                logits[self.tokens[state.said % self.tokens.len()] as usize] = 1.0;
                state.said += 1;
                logits
            })
        };
        let said: Vec<_> = parts.iter_mut().map(say).collect();
        if said.iter().any(Option::is_some) {
            self.marks.lock().unwrap().answered.push(Instant::now());
        }
        Ok(said)
    }
}

/// A connection that is kept, and what comes on it.
struct Client {
    stream: TcpStream,
    number: usize,
    /// Whether it asks for what has come again and again, so that nobody has to wake it.
    sleepless: bool,
}

impl Client {
    fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            number: 0,
            sleepless: false,
        }
    }

    fn stay_awake(&mut self) {
        self.stream.set_nonblocking(true).unwrap();
        self.sleepless = true;
    }

    /// Asks what nobody asked before, so that no cache answers.
    fn ask(&mut self, tokens_max: usize, answers: usize, stream: bool) -> Instant {
        self.number += 1;
        let number = self.number;
        let body = format!(
            r#"{{"messages":[{{"role":"user","content":"What is {number}?"}}],"max_tokens":{tokens_max},"n":{answers},"stream":{stream}}}"#
        );
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let sent = Instant::now();
        self.stream.write_all(request.as_bytes()).unwrap();
        sent
    }

    /// Reads a whole answer; when each piece of it came that has text in it.
    fn hear(&mut self) -> Vec<Instant> {
        let (mut heard, mut times) = (String::new(), Vec::new());
        let mut piece = [0; 1 << 16];
        while !is_whole(&heard) {
            let length = match self.stream.read(&mut piece) {
                Err(error) if self.sleepless && error.kind() == ErrorKind::WouldBlock => {
                    spin_loop();
                    continue;
                }
                read => read.unwrap(),
            };
            let now = Instant::now();
            assert!(length > 0, "hung up after {heard}");
            let text = std::str::from_utf8(&piece[..length]).unwrap();
            let pieces = text.matches("\"content\":\"").count();
            let role = text.matches("\"role\"").count();
            times.extend((0..pieces - role.min(pieces)).map(|_| now));
            heard.push_str(text);
        }
        assert!(heard.starts_with("HTTP/1.1 200"), "{heard}");
        times
    }
}

/// Whether an answer is there to its last byte.
fn is_whole(heard: &str) -> bool {
    let Some((head, body)) = heard.split_once("\r\n\r\n") else {
        return false;
    };
    match head.split_once("content-length: ") {
        Some((_, rest)) => {
            let digits = rest.split("\r\n").next().unwrap();
            body.len() >= digits.parse().unwrap()
        }
        None => body.ends_with("0\r\n\r\n"),
    }
}

/// Serves on a thread of its own until the process ends.
fn serve(house: Arc<House>) -> SocketAddr {
    let (tell, told) = channel();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            tell.send(tcp.local_addr().unwrap()).unwrap();
            let api = Listener { tcp, tls: None };
            visor::serve(
                Listeners { api, admin: None },
                house,
                std::future::pending(),
            )
            .await;
        });
    });
    told.recv().unwrap()
}

/// Least, median and 99th percentile; printed. The least is what a machine takes that does nothing else.
fn tell(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    println!(
        "{what:<60} {:8.1} us, p99 {:8.1} us, least {:8.1} us",
        micros(at(50)),
        micros(at(99)),
        micros(at(0))
    );
    at(50)
}

/// One request of one token at a time: the way in, the way out, and both without what the engine does in between.
fn requests(client: &mut Client, script: &Script) -> Duration {
    let (mut way_in, mut way_out, mut added) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..UNCOUNTED + REQUESTS {
        *script.marks.lock().unwrap() = Marks::default();
        let sent = client.ask(1, 1, false);
        client.hear();
        let over = Instant::now();
        let marks = script.marks.lock().unwrap();
        let (begun, answered) = (marks.begun[0], *marks.answered.last().unwrap());
        if round >= UNCOUNTED {
            way_in.push(begun - sent);
            way_out.push(over - answered);
            added.push((begun - sent) + (over - answered));
        }
    }
    tell("request on the socket to model", way_in);
    tell("last token of the model to answer on the socket", way_out);
    tell("added to a request of one token", added)
}

/// One stream at a time whose tokens come so far apart that each travels alone.
fn tokens(client: &mut Client, script: &Script, what: &str) {
    *script.pace.lock().unwrap() = PACE;
    let (mut times, mut caught_up) = (Vec::new(), 0);
    for round in 0..REQUESTS / 10 {
        *script.marks.lock().unwrap() = Marks::default();
        client.ask(TOKENS, 1, true);
        let heard = client.hear();
        let marks = script.marks.lock().unwrap();
        // On a machine that is busy a token may be caught up with by the next; then nobody can say which was heard when.
        if heard.len() != marks.answered.len() {
            caught_up += 1;
            continue;
        }
        // The first and the last bring other events along.
        let pairs = heard.iter().zip(&marks.answered).skip(1).take(TOKENS - 2);
        if round > 0 {
            times.extend(pairs.map(|(heard, said)| heard.saturating_duration_since(*said)));
        }
    }
    if !times.is_empty() {
        tell(what, times);
    }
    if caught_up > 0 {
        println!("  {caught_up} streams left out, in which tokens came together");
    }
}

/// What the system takes to wake so many threads that wait, one by the other, as far apart as tokens that travel alone.
fn wakes(count: usize, what: &str) {
    let (first, mut last) = channel();
    for _ in 1..count {
        let (next, hears) = channel();
        let hears: Receiver<Instant> = std::mem::replace(&mut last, hears);
        thread::spawn(move || hears.iter().try_for_each(|said| next.send(said)));
    }
    let hearing = thread::spawn(move || last.iter().map(|said| said.elapsed()).collect());
    for _ in 0..WAKES {
        thread::sleep(PACE);
        first.send(Instant::now()).unwrap();
    }
    drop(first);
    tell(what, hearing.join().unwrap());
}

/// What the system takes for a token that travels alone, were there nothing to do for it: the thread is woken that writes it.
fn bare() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut socket = listener.accept().unwrap().0;
    socket.set_nodelay(true).unwrap();
    let (say, said) = channel::<[u8; TOKEN_BYTES]>();
    thread::spawn(move || said.iter().try_for_each(|token| socket.write_all(&token)));
    let (tell_said, told) = channel();
    thread::spawn(move || {
        for _ in 0..WAKES {
            thread::sleep(PACE);
            tell_said.send(Instant::now()).unwrap();
            say.send([0; TOKEN_BYTES]).unwrap();
        }
    });
    let mut piece = [0; TOKEN_BYTES];
    let mut hear = || {
        let mut heard = 0;
        while heard < TOKEN_BYTES {
            match client.read(&mut piece[heard..]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => spin_loop(),
                read => heard += read.unwrap(),
            }
        }
        let heard = Instant::now();
        heard - told.recv().unwrap()
    };
    let times = (0..WAKES).map(|_| hear()).collect();
    tell(
        "waking a thread that writes as much, read without a wake",
        times,
    );
}

/// A stream of a model that takes no time: what a token costs when the next one is there already. The adapter writes several answers
/// itself, and shows how one is written.
fn flood(client: &mut Client, script: &Script, (answers, what): (usize, &str)) -> Duration {
    *script.pace.lock().unwrap() = Duration::ZERO;
    let mut times = Vec::new();
    for _ in 0..REQUESTS / 10 {
        *script.marks.lock().unwrap() = Marks::default();
        client.ask(TOKENS * 8, answers, true);
        client.hear();
        let over = Instant::now();
        let begun = script.marks.lock().unwrap().begun[0];
        times.push((over - begun) / (TOKENS * 8 * answers) as u32);
    }
    tell(what, times)
}

fn main() -> ExitCode {
    let mut script = Script::default();
    let made = &mut script;
    let house = House::open_with(Config::default(), |checkpoint| {
        made.vocabulary = checkpoint.config().vocab_size;
        let tokenizer = checkpoint.tokenizer().unwrap();
        // The first may be the space that answers do not begin with.
        made.tokens = tokenizer.encode_text("one and two and three").split_off(1);
        made.clone()
    });
    let house = house.unwrap();
    house.wait_ready().unwrap();
    let address = serve(house);
    let mut client = Client::connect(address);
    let request = requests(&mut client, &script);
    tokens(
        &mut client,
        &script,
        "token of the model to a client, alone",
    );
    let mut sleepless = Client::connect(address);
    sleepless.stay_awake();
    let what = "token of the model to the socket, alone: read without a wake";
    tokens(&mut sleepless, &script, what);
    bare();
    wakes(1, "waking a thread that waits");
    wakes(WOKEN, "waking two, one by the other");
    let floods = [
        (1, "each token of a model that takes no time"),
        (2, "the same of two answers, which the adapter writes"),
    ];
    let floods = floods.map(|flooded| flood(&mut client, &script, flooded));
    // Without optimizations the figures say nothing.
    let slow = request > REQUEST_MAX || floods.iter().any(|token| *token > TOKEN_MAX);
    if slow && !cfg!(debug_assertions) {
        println!("over the bars: {REQUEST_MAX:?} for a request, {TOKEN_MAX:?} for a token");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
