//! Running generations: the engine's events to the adapter, the adapter's bytes to the client.

use std::time::{Duration, Instant};

use visor_engine::{Event as EngineEvent, EventReceiver};
use visor_sandbox::{Event, Exchange, Generation, Head, Next, Progress};

use super::failure::Failure;
use super::frame::{Framing, Text};
use super::generate::{self, Keep, Origin, Running};
use super::output::Output;
use super::record::Stage;
use super::reply::Reply;
use super::restore;
use super::told::Told;
use super::work::{Stop, Work};

/// Longest wait before the deadline is looked at again.
const TICK: Duration = Duration::from_secs(1);
/// Longest wait for one answer while others of the same exchange may have something to say.
const GLANCE: Duration = Duration::from_millis(10);

/// Runs the generations of an exchange, and those it asks for later, to the end of its response.
///
/// # Errors
/// What any of them is refused or stopped by; the caller tells the client.
pub(super) fn run(
    work: &mut Work,
    reply: &mut Reply,
    exchange: Exchange,
    (head, generations): (Head, Vec<Generation>),
) -> Result<(), Stop> {
    work.trace.incremental = head.incremental;
    let mut drive = Drive {
        exchange,
        is_json: restore::is_json(&head.headers),
        following: Vec::new(),
        started: 0,
        answers: 0,
        framing: Framing::default(),
        output: Output::new(reply, head),
        ended: false,
    };
    let ended = drive.go(work, generations);
    for following in &mut drive.following {
        following.settle(work);
    }
    ended?;
    drive.output.finish(work)
}

struct Drive<'a> {
    exchange: Exchange,
    /// What it writes.
    is_json: bool,
    /// Submitted and not yet over.
    following: Vec<Following>,
    /// Generations so far.
    started: u32,
    /// Answers so far, of all generations.
    answers: u32,
    /// How the adapter writes texts.
    framing: Framing,
    output: Output<'a>,
    /// The adapter said that its response is complete.
    ended: bool,
}

/// A generation under way.
struct Following {
    told: Told,
    /// Where the events of each choice come from.
    choices: Vec<EventReceiver>,
    keep: Option<Keep>,
}

impl Drive<'_> {
    /// From the first generations to the end of the last.
    fn go(&mut self, work: &mut Work, generations: Vec<Generation>) -> Result<(), Stop> {
        self.start(work, generations)?;
        while !self.ended && !self.following.is_empty() {
            self.round(work)?;
        }
        Ok(())
    }

    /// Takes generations as far as the engine's queue.
    fn start(&mut self, work: &mut Work, generations: Vec<Generation>) -> Result<(), Stop> {
        let count_max = work.call.pinned.config.server.generations_per_request_max;
        let more = generations.iter().map(|generation| generation.count);
        self.answers = more.fold(self.answers, u32::saturating_add);
        if self.answers > count_max {
            let message = format!(
                "{} answers were asked for; a request may have {count_max}",
                self.answers
            );
            let mut hints = generations.iter().flat_map(|asked| &asked.extensions);
            let named = hints.find(|(key, _)| key == "count.param");
            let named = named.map_or("n", |(_, name)| name.as_str());
            return Err(Failure::invalid(message).at(named).into());
        }
        for mut generation in generations {
            let restored = work.restorer.generation(&mut generation);
            let adapter = work.call.pinned.adapter.id();
            restored.map_err(|repeated| Failure::nonsense(adapter, &repeated.to_string()))?;
            let running = generate::start(work, generation, self.started)?;
            self.following.push(follow(work, running));
            self.started += 1;
        }
        Ok(())
    }

    /// Waits until there is something to tell, and tells it: at most one call of the adapter for all
    /// that has come by now.
    fn round(&mut self, work: &mut Work) -> Result<(), Stop> {
        work.check()?;
        if !self.tell_all(work)? {
            match self.wait(work) {
                Some((at, choice, event)) => self.tell(work, at, choice, event)?,
                None => self.keep_alive(work)?,
            }
            self.tell_all(work)?;
        }
        let events = self.following.iter_mut().flat_map(|f| f.told.take());
        let events: Vec<_> = events.collect();
        self.following.retain(|following| !following.told.over());
        if events.is_empty() {
            return Ok(());
        }
        let framed = Text::of(&events).and_then(|text| self.framing.write(&text));
        let (bytes, next) = match framed {
            Some(bytes) => (bytes, Next::More),
            None => self.advance(work, events)?,
        };
        let bytes = work.restorer.answer(bytes, self.is_json)?;
        self.output.write(work, bytes)?;
        match next {
            Next::More => Ok(()),
            Next::End => {
                // Whatever else runs for this exchange has nobody left to talk to.
                self.ended = true;
                Ok(())
            }
            Next::Generate(generations) => self.start(work, generations),
        }
    }

    /// Hands events over to the adapter.
    fn advance(&mut self, work: &mut Work, events: Vec<Event>) -> Result<(Vec<u8>, Next), Stop> {
        let told = Text::of(&events).map(Text::into_owned);
        let began = Instant::now();
        let progress = self.exchange.advance(events);
        work.trace.stages.add(Stage::Adapter, began.elapsed());
        let progress = progress.map_err(Failure::from)?;
        let Progress { bytes, next, frame } = progress;
        if let Err(wrong) = self.framing.set(frame, told, &bytes) {
            let plugin = work.call.pinned.adapter.id();
            tracing::warn!(target: "visor::plugin", %plugin, request = %work.call.incoming.id, "{wrong}");
        }
        Ok((bytes, next))
    }

    /// Tells every event that is there; whether there is anything to hand over now.
    fn tell_all(&mut self, work: &mut Work) -> Result<bool, Stop> {
        let mut any = false;
        for at in 0..self.following.len() {
            for choice in 0..self.following[at].choices.len() {
                while let Some(event) = self.following[at].next(choice, Duration::ZERO) {
                    self.tell(work, at, choice, event)?;
                }
            }
            any |= self.following[at].told.pending();
        }
        Ok(any)
    }

    /// The next event of the first answer that is not over. While there are others, it is waited
    /// for only shortly.
    fn wait(&self, work: &Work) -> Option<(usize, usize, EngineEvent)> {
        let mut open = self.following.iter().enumerate().flat_map(|(at, f)| {
            let choices = (0..f.choices.len()).filter(|choice| !f.told.choice_over(*choice));
            choices.map(move |choice| (at, choice))
        });
        let (at, choice) = open.next()?;
        let patience = match open.next() {
            Some(_) => self.patience(work).min(GLANCE),
            None => self.patience(work),
        };
        let event = self.following[at].next(choice, patience)?;
        Some((at, choice, event))
    }

    /// Tells one event. A failure before the head ends the exchange with its proper status; after
    /// it, the adapter hears of it as the generation's last event.
    fn tell(
        &mut self,
        work: &mut Work,
        at: usize,
        choice: usize,
        event: EngineEvent,
    ) -> Result<(), Stop> {
        let following = &mut self.following[at];
        let Following { told, keep, .. } = following;
        match told.event(work, choice, event, keep) {
            Err(Stop::Failed(failure)) if self.output.head_sent() => {
                work.trace.failed = Some(failure.outcome);
                following.settle(work);
                following.told.failed(failure.error);
                Ok(())
            }
            told => told,
        }
    }

    /// Until the next keep-alive, the deadline, or the next look at both.
    fn patience(&self, work: &Work) -> Duration {
        let left = work.deadline.saturating_duration_since(Instant::now());
        left.min(self.until_keep_alive(work).unwrap_or(TICK))
            .min(TICK)
    }

    fn until_keep_alive(&self, work: &Work) -> Option<Duration> {
        let every = Duration::from_secs(work.call.pinned.config.server.keep_alive_s);
        let wanted = self.output.incremental() && !every.is_zero();
        wanted.then(|| every.saturating_sub(self.output.written.elapsed()))
    }

    fn keep_alive(&mut self, work: &mut Work) -> Result<(), Stop> {
        if self
            .until_keep_alive(work)
            .is_some_and(|left| left.is_zero())
        {
            let bytes = self.exchange.keep_alive().map_err(Failure::from)?;
            self.output.written = Instant::now();
            self.output.write(work, bytes)?;
        }
        Ok(())
    }
}

/// What is known at once is told at once.
fn follow(work: &mut Work, running: Running) -> Following {
    let Running {
        index,
        origin,
        prefill,
        calls,
        keep,
    } = running;
    let (told, choices) = match origin {
        Origin::Engine(choices) => {
            let told = Told::new(index, prefill, (choices.len(), calls));
            (told, choices)
        }
        Origin::Cache(answer, count) => {
            work.trace.response_cached = true;
            let mut told = Told::new(index, None, (count, calls));
            (0..count).for_each(|choice| told.answer(work, choice, &answer));
            (told, Vec::new())
        }
        Origin::Counted(usage) => {
            let mut told = Told::new(index, None, (0, None));
            told.counted(work, usage);
            (told, Vec::new())
        }
    };
    Following {
        told,
        choices,
        keep,
    }
}

impl Following {
    /// Counts what came and is told to nobody any more. What the engine does until it hears of the end is not waited for.
    fn settle(&mut self, work: &mut Work) {
        for choice in 0..self.choices.len() {
            while let Some(event) = self.next(choice, Duration::ZERO) {
                self.told.count(work, choice, &event);
            }
        }
    }

    /// The next event of a choice, if there is one in time and the choice is not over.
    fn next(&self, choice: usize, timeout: Duration) -> Option<EngineEvent> {
        if self.told.choice_over(choice) {
            return None;
        }
        // An answer that is not over has an event left.
        self.choices[choice].recv_timeout(timeout).ok()
    }
}
