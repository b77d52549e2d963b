//! The command line: what may be typed, and which room does it.
//!
//! Exit codes: 0 done; 1 done, and the answer is no (a check failed, a comparison missed, a request
//! was refused); 2 the command line or the configuration is wrong; 3 it could not start (address in
//! use, checkpoint unreadable); 130 stopped by Ctrl-C (a server by the second).

mod ask;
mod bench;
mod client;
mod config;
mod eval;
mod models;
mod plugin;
mod progress;
mod quantize;
mod serve;
mod signals;
mod start;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::Resettable;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use visor_model::{DeviceChoice, Quantization};

use crate::eval::Floor;

/// Done.
pub const EXIT_DONE: u8 = 0;
/// Done, and the answer is no.
pub const EXIT_NO: u8 = 1;
/// The command line or the configuration is wrong.
pub const EXIT_USAGE: u8 = 2;
/// It could not start.
pub const EXIT_START: u8 = 3;
/// Stopped by Ctrl-C before it was done; a server by the second.
pub const EXIT_STOPPED: u8 = 130;

const EXAMPLES: &str = "\
Examples:
  visor                                     serve the demo model on 127.0.0.1:8080
  visor serve --model ~/Phi-3.5-vision      serve a Hugging Face checkpoint
  visor ask photo.jpg \"What is this?\"       one answer, no server
  visor config show > visor.toml            a configuration to edit
  visor config check visor.toml             what is wrong with it, with line and key
  visor plugin check my-template.wasm       the checks the server runs before using it
  visor verify --golden tests/golden        compare this machine with the reference
  visor bench --shape phi-3.5-vision        what a model of that size does here, with random weights
  visor quantize ~/Phi-3.5-vision ~/phi-int4  four bits a weight (the tower eight), in MLX's format
  visor eval --suite tests/suite            how many questions about pictures are answered right

Exit codes:
  0  done
  1  done, and the answer is no: a check failed, a comparison missed, a request was refused
  2  the command line or the configuration is wrong
  3  it could not start: address in use, checkpoint unreadable
  130  stopped by Ctrl-C before it was done; a server by the second

The HTTP side: POST /v1/chat/completions, GET /v1/models, /health, /ready, /stats, /metrics, and what /openapi.json lists.";

/// Answers questions about pictures: a local server for Phi-3.5-vision.
///
/// Without a command, visor serves. It needs no files: a demo model, default plugins and a default
/// configuration are inside the binary, and files on disk override them.
#[derive(Debug, Parser)]
#[command(name = "visor", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve HTTP until Ctrl-C (the default).
    Serve(ServeArgs),
    /// Ask one question about one or more pictures, without a server.
    Ask(AskArgs),
    /// Compare this build with the reference, stage by stage.
    Verify(VerifyArgs),
    /// Check a configuration file, or show the one in force.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// List plugins, or check a file before the server gets it.
    #[command(subcommand)]
    Plugin(PluginCommand),
    /// Describe the configured model: size, type, context.
    Models(ModelsArgs),
    /// Measure on this machine: load time, first token, tokens a second, memory.
    Bench(BenchArgs),
    /// Make an MLX checkpoint of INT4 and INT8 of a float one, tensor by tensor.
    #[command(after_help = quantize::HELP)]
    Quantize(QuantizeArgs),
    /// Ask a suite of questions about pictures, and tell how many answers are right.
    #[command(after_help = eval::HELP, mut_arg("model", |model| model.visible_alias("checkpoint")))]
    Eval(EvalArgs),
}

/// What overrides the configuration file; flags win over the environment.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Overrides {
    /// Configuration file [default: visor.toml in the working directory, when there is one]
    #[arg(long, value_name = "FILE", env = "VISOR_CONFIG")]
    pub config: Option<PathBuf>,
    /// Folder of a Hugging Face phi3_v checkpoint [default: the demo inside the binary]
    #[arg(long, value_name = "PATH", env = "VISOR_MODEL")]
    pub model: Option<PathBuf>,
    /// auto, cpu, metal or cuda
    #[arg(long, value_name = "D", env = "VISOR_DEVICE")]
    pub device: Option<DeviceChoice>,
    /// none or int4: what becomes of weights stored as floats
    #[arg(long, value_name = "Q", env = "VISOR_QUANTIZATION")]
    pub quantization: Option<Quantization>,
    /// Folder watched for plugins
    #[arg(long, value_name = "DIR", env = "VISOR_PLUGINS")]
    pub plugins: Option<PathBuf>,
    /// error, warn, info, debug, trace, or directives such as info,visor_engine=debug
    #[arg(long, value_name = "FILTER", env = "VISOR_LOG")]
    pub log: Option<String>,
}

#[derive(Clone, Debug, clap::Args)]
struct ServeArgs {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDR", env = "VISOR_LISTEN")]
    listen: Option<String>,
    #[command(flatten)]
    overrides: Overrides,
}

#[derive(Debug, clap::Args)]
struct AskArgs {
    /// A JPEG, PNG or WebP picture
    image: PathBuf,
    /// What to ask about it
    question: String,
    /// Further pictures, in order (repeatable)
    #[arg(long = "image", value_name = "IMAGE")]
    more: Vec<PathBuf>,
    /// A system message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of the answer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// Sampling temperature; 0 is greedy
    #[arg(long, value_name = "T", value_parser = temperature)]
    temperature: Option<f32>,
    /// Seed of the sampling
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How finely the picture is looked at
    #[arg(long, value_name = "DETAIL", value_parser = ["low", "high", "auto"])]
    detail: Option<String>,
    #[command(flatten)]
    overrides: Overrides,
}

#[derive(Debug, clap::Args)]
struct VerifyArgs {
    /// Folder with ckpt_*/, cases/, images/, preprocess.*, tokenizer_cases.json; each optional
    #[arg(long, value_name = "DIR")]
    golden: PathBuf,
    /// Tokenizer file to compare [default: the golden's, else the embedded one]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Checkpoint to compare instead of the golden's own
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// auto, cpu, metal or cuda
    #[arg(long, value_name = "D", default_value = "auto", env = "VISOR_DEVICE")]
    device: DeviceChoice,
    /// One JSON object a line instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Explain every mistake in a file with its line and key, and what the plugins have to say to it.
    Check {
        /// The file to check
        file: PathBuf,
    },
    /// Print the configuration in force: file, environment and defaults together.
    Show(ServeArgs),
}

#[derive(Debug, Subcommand)]
enum PluginCommand {
    /// Plugins in the folder and in the binary: which serve, which are bad and why.
    List {
        /// One JSON document instead of a table
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        overrides: Overrides,
    },
    /// Run the checks the server runs before it uses a plugin.
    Check {
        /// The .wasm file
        file: PathBuf,
        /// One JSON document instead of text
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        overrides: Overrides,
    },
}

#[derive(Debug, clap::Args)]
struct ModelsArgs {
    /// One JSON document instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    overrides: Overrides,
}

#[derive(Debug, clap::Args)]
struct BenchArgs {
    /// A picture to ask about [default: a built-in one of 512x512]
    image: Option<PathBuf>,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Requests to measure, one after the other
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    /// Measure every stage with random weights of a shape, whatever model is configured: phi-3.5-vision, or a config.json
    #[arg(long, value_name = "SHAPE", conflicts_with_all = ["image", "max_tokens", "requests"])]
    shape: Option<String>,
    /// With --shape, how the vision tower and the projector are stored: int8 as `visor quantize` does, int4 or float
    #[arg(long, value_name = "FORM", default_value = "int8", requires = "shape")]
    vision: quantize::Form,
    /// Where such weights are kept [default: visor/bench in the user's cache folder]
    #[arg(long, value_name = "DIR", requires = "shape")]
    shape_folder: Option<PathBuf>,
    /// With --shape, run a prompt of 2509 tokens and a picture of sixteen crops too
    #[arg(long, requires = "shape")]
    long: bool,
    /// One JSON document instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    overrides: Overrides,
}

#[derive(Debug, clap::Args)]
struct QuantizeArgs {
    /// Folder of a Hugging Face phi3_v checkpoint, f32, f16 or bf16
    source: PathBuf,
    /// Folder to write; it must not exist
    target: PathBuf,
    /// Linears of the vision tower and the projector: int8, int4 or float
    #[arg(long, value_name = "FORM", default_value = "int8")]
    vision: quantize::Form,
    /// Token embeddings and lm_head: int8, int4 or float
    #[arg(long, value_name = "FORM", default_value = "int4")]
    embeddings: quantize::Form,
    /// f16 or bf16: scales, biases, and whatever stays float
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    float_type: quantize::Floats,
    /// Do not run both checkpoints on a picture and a text, layer by layer
    #[arg(long)]
    no_compare: bool,
    /// One JSON document instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct EvalArgs {
    /// Folder with cases.jsonl and its pictures [default: tests/suite, when there is one]
    #[arg(long, value_name = "DIR")]
    suite: Option<PathBuf>,
    /// A second configuration file, to be compared with the first
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Write a page with every picture, question, answer and verdict
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Exit with 1 when a category (or `all`) has fewer percent right (repeatable)
    #[arg(long, value_name = "CATEGORY=PERCENT")]
    min: Vec<Floor>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// One JSON document, with every answer, instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    overrides: Overrides,
}

impl Args {
    /// What was typed, and what the environment says beside; ends the process where that is no command line of ours.
    #[must_use]
    pub fn typed() -> Self {
        let matches = without_empty_variables(Self::command()).get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// A variable that is empty is one that is not set: so it comes out of a container's file that passes on what it does not have.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty = |name: &std::ffi::OsStr| std::env::var_os(name).is_some_and(|v| v.is_empty());
    command
        .mut_args(|arg| match arg.get_env().is_some_and(is_empty) {
            true => arg.env(Resettable::Reset),
            false => arg,
        })
        .mut_subcommands(without_empty_variables)
}

/// The temperatures that make sense of an answer.
fn temperature(typed: &str) -> Result<f32, String> {
    let number = typed.parse::<f32>().ok();
    number
        .filter(|number| (0.0..=2.0).contains(number))
        .ok_or_else(|| "a number from 0 to 2 is allowed".to_owned())
}

/// A failure and the exit code it ends with.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    error: anyhow::Error,
}

impl Failure {
    fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: EXIT_USAGE,
            error: error.into(),
        }
    }

    fn start(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: EXIT_START,
            error: error.into(),
        }
    }

    fn no(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: EXIT_NO,
            error: error.into(),
        }
    }
}

/// A broken pipe or a full disk under standard output.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::no(error)
    }
}

/// Does what the command line asks; errors go to standard error.
#[must_use]
pub fn run(args: Args) -> ExitCode {
    let done = match args.command {
        None => serve::run(&args.serve),
        Some(Command::Serve(args)) => serve::run(&args),
        Some(Command::Ask(args)) => ask::run(&args),
        Some(Command::Verify(args)) => verify::run(&args),
        Some(Command::Config(ConfigCommand::Check { file })) => config::check(&file),
        Some(Command::Config(ConfigCommand::Show(args))) => {
            config::show(&args.overrides, args.listen.as_deref())
        }
        Some(Command::Plugin(PluginCommand::List { json, overrides })) => {
            plugin::list(json, &overrides)
        }
        Some(Command::Plugin(PluginCommand::Check {
            file,
            json,
            overrides,
        })) => plugin::check(&file, json, &overrides),
        Some(Command::Models(args)) => models::run(&args),
        Some(Command::Bench(args)) => bench::run(&args),
        Some(Command::Quantize(args)) => quantize::run(&args),
        Some(Command::Eval(args)) => eval::run(&args),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            // The configuration's own mistakes come with their own "error:".
            let text = format!("{:#}", failure.error);
            let prefix = if text.starts_with("error:") {
                ""
            } else {
                "error: "
            };
            progress::line(&format!("{prefix}{text}"));
            ExitCode::from(failure.code)
        }
    }
}
