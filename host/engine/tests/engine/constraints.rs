//! Answers that may not say everything: whatever happens to a sequence, its rules go on where it was.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use visor_engine::{
    Constraint, ConstraintError, EngineError, Finish, GenerateRequest, Grammar, Sampling,
};

use crate::heard::*;
use crate::scripted::*;

/// Lets every third token come next or so, which ones depends on all before; complete now and then.
#[derive(Debug, Default)]
pub(crate) struct Mottled {
    /// What each answer followed.
    pub(crate) answers: Mutex<Vec<Arc<Mutex<Vec<u32>>>>>,
    /// Answers that end of themselves.
    pub(crate) completes: bool,
}

struct Following {
    tokens: Arc<Mutex<Vec<u32>>>,
    completes: bool,
}

fn hashed(tokens: &[u32], what: u32) -> u64 {
    let mut hasher = DefaultHasher::new();
    (tokens, what).hash(&mut hasher);
    hasher.finish()
}

pub(crate) fn may_come(tokens: &[u32], next: u32) -> bool {
    // Every answer may go on somehow.
    next == END || next == 100 || hashed(tokens, next).is_multiple_of(3)
}

impl Grammar for Mottled {
    fn follow(&self) -> Box<dyn Constraint> {
        let tokens: Arc<Mutex<Vec<u32>>> = Arc::default();
        self.answers.lock().unwrap().push(Arc::clone(&tokens));
        Box::new(Following {
            tokens,
            completes: self.completes,
        })
    }
}

impl Constraint for Following {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError> {
        let tokens = self.tokens.lock().unwrap();
        for (id, logit) in (0_u32..).zip(logits) {
            if !may_come(&tokens, id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<bool, ConstraintError> {
        let mut tokens = self.tokens.lock().unwrap();
        assert!(may_come(&tokens, token), "{token} after {tokens:?}");
        tokens.push(token);
        Ok(self.completes && hashed(&tokens, 0).is_multiple_of(11))
    }
}

/// Breaks in a way of its own at a token.
#[derive(Debug, Clone, Copy)]
enum Broken {
    Mask(usize),
    Accept(usize),
    Panic(usize),
    Nothing(usize),
}

struct Breaking(Broken, usize);

impl Grammar for Broken {
    fn follow(&self) -> Box<dyn Constraint> {
        Box::new(Breaking(*self, 0))
    }
}

impl Constraint for Breaking {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError> {
        match self.0 {
            Broken::Mask(at) if at == self.1 => Err(ConstraintError("too much".into())),
            Broken::Panic(at) if at == self.1 => panic!("scripted panic of a constraint"),
            Broken::Nothing(at) if at == self.1 => {
                logits.fill(f32::NEG_INFINITY);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn accept(&mut self, _: u32) -> Result<bool, ConstraintError> {
        self.1 += 1;
        match self.0 {
            Broken::Accept(at) if at == self.1 => Err(ConstraintError("too much".into())),
            _ => Ok(false),
        }
    }
}

fn constrained(grammar: Arc<dyn Grammar>, tokens_max: u32) -> GenerateRequest {
    let mut request = request(tokens_max);
    request.grammar = Some(grammar);
    request.sampling = Sampling {
        temperature: 1.0,
        seed: Some(5),
        ..Sampling::default()
    };
    request
}

#[test]
fn what_may_not_come_is_neither_drawn_nor_told_however_tokens_are_drawn() {
    let engine = start(&Script::new(Answer::Hashed(600)));
    let samplings = [
        Sampling::default(),
        Sampling {
            temperature: 1.0,
            top_k: 5,
            top_p: 0.7,
            min_p: 0.1,
            ..Sampling::default()
        },
        Sampling {
            temperature: 2.0,
            logit_bias: (0..300).map(|token| (token, 100.0)).collect(),
            repetition_penalty: 0.5,
            frequency_penalty: -2.0,
            ..Sampling::default()
        },
    ];
    for sampling in samplings {
        for seed in 0..5 {
            let grammar = Arc::new(Mottled::default());
            let mut request = constrained(Arc::clone(&grammar) as _, 30);
            request.sampling = Sampling {
                seed: Some(seed),
                logprobs: Some(20),
                ..sampling.clone()
            };
            let heard = ask(&engine, request);
            assert_eq!(heard.reason(), Some(Finish::Length));
            let answer = grammar.answers.lock().unwrap()[0].lock().unwrap().clone();
            assert_eq!(answer.len(), 30);
            let mut told = 0;
            for info in &heard.infos {
                // Tokens that add nothing to the text are not told of.
                let at = (told..answer.len()).find(|at| answer[*at] == info.chosen.token);
                told = at.expect("tokens are told in order");
                let mut share = 0.0;
                for chance in &info.alternatives {
                    assert!(may_come(&answer[..told], chance.token));
                    assert!(chance.logprob.is_finite());
                    share += chance.logprob.exp();
                }
                assert!(share <= 1.001, "{share}");
                told += 1;
            }
        }
    }
}

#[test]
fn an_answer_that_nothing_can_follow_ends_without_a_stop_token() {
    let grammar = Arc::new(Mottled {
        completes: true,
        ..Mottled::default()
    });
    let engine = start(&Script::new(Answer::Hashed(600)));
    let heard = ask(&engine, constrained(Arc::clone(&grammar) as _, 300));
    assert_eq!(heard.reason(), Some(Finish::Stop));
    let answer = grammar.answers.lock().unwrap()[0].lock().unwrap().clone();
    assert!(answer.len() < 300 && !answer.contains(&END));
    assert_eq!(heard.usage().completion_tokens as usize, answer.len());
    // One token fewer, and it is cut.
    let grammar = Arc::new(Mottled {
        completes: true,
        ..Mottled::default()
    });
    let fewer = answer.len() as u32 - 1;
    let cut = ask(&engine, constrained(grammar, fewer));
    assert_eq!(cut.reason(), Some(Finish::Length));
    let exact = ask(
        &engine,
        constrained(
            Arc::new(Mottled {
                completes: true,
                ..Mottled::default()
            }),
            fewer + 1,
        ),
    );
    assert_eq!(exact.reason(), Some(Finish::Stop));
}

#[test]
fn rules_that_cannot_be_followed_cost_their_own_request_only() {
    let script = Script::new(Answer::Hashed(600));
    let mut options = options();
    options.sequences_max = 4;
    let engine = start_with(&script, options);
    engine.wait_ready(PATIENCE);
    let mut free = request(30);
    free.sampling.temperature = 1.0;
    free.sampling.seed = Some(3);
    let want = ask(&engine, free.clone()).text;
    for broken in [
        Broken::Mask(0),
        Broken::Mask(4),
        Broken::Accept(3),
        Broken::Panic(2),
        Broken::Nothing(1),
    ] {
        let beside = engine.submit(free.clone()).unwrap();
        let heard = ask(&engine, constrained(Arc::new(broken), 30));
        let error = heard.error();
        assert!(
            matches!(error, EngineError::Constraint(_)),
            "{broken:?}: {error}"
        );
        assert_eq!(hear(&beside).text, want, "{broken:?}");
    }
    let stats = engine.stats();
    assert_eq!((stats.failed, stats.finished), (5, 6));
    assert_eq!((stats.running, stats.waiting), (0, 0));
    assert_eq!(stats.device_fallbacks, 0);
}

/// Sequences that give up their blocks and run again say what they say alone, and the rules of each saw every token once.
#[test]
fn a_sequence_that_runs_again_goes_on_within_its_rules() {
    let run = |sequences_max: usize, blocks: u64| {
        let (script, hold) = Script::new(Answer::Hashed(600)).held_at(0);
        let mut options = options();
        options.sequences_max = sequences_max;
        options.kv_bytes = 1000 * blocks;
        options.context_tokens_max = 60;
        let engine = start_with(&script, options);
        engine.wait_ready(PATIENCE);
        let grammars: Vec<_> = (0..4).map(|_| Arc::new(Mottled::default())).collect();
        let asked = AtomicUsize::new(0);
        let events: Vec<_> = grammars
            .iter()
            .map(|grammar| {
                let mut request = constrained(Arc::clone(grammar) as _, 40);
                let seed = asked.fetch_add(1, Ordering::Relaxed) as u64;
                request.sampling.seed = Some(seed);
                engine.submit(request).unwrap()
            })
            .collect();
        drop(hold);
        let texts: Vec<String> = events.iter().map(|events| hear(events).text).collect();
        let followed: Vec<Vec<u32>> = grammars
            .iter()
            .map(|grammar| grammar.answers.lock().unwrap()[0].lock().unwrap().clone())
            .collect();
        (texts, followed, engine.stats().preempted)
    };
    let (texts, followed, _) = run(1, 1000);
    let (squeezed, followed_squeezed, preempted) = run(4, 20);
    assert!(preempted > 0, "nobody had to give up its blocks");
    assert_eq!(squeezed, texts);
    assert_eq!(followed_squeezed, followed);
}
