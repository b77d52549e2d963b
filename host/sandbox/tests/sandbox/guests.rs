//! Guests written by hand: core modules in the text format with the component type of a world
//! embedded, which is what a plugin author's compiler produces.

use std::path::Path;
use std::sync::Arc;

use visor_sandbox::{
    ChatRole, Conversation, LoadError, Message, Origin, Part, Plugin, PluginSettings, SampleModel,
    Sandbox, SandboxOptions,
};
use wit_component::StringEncoding;
use wit_parser::Resolve;

/// A sandbox with the sample model and the given options.
pub(crate) fn sandbox_with(options: SandboxOptions) -> Sandbox {
    Sandbox::new(options, Arc::new(SampleModel)).unwrap()
}

/// A sandbox with room for a few instances and short budgets.
pub(crate) fn sandbox() -> Sandbox {
    let mut options = SandboxOptions {
        instances_max: 8,
        ..SandboxOptions::default()
    };
    options.budgets.render_ms = 100;
    sandbox_with(options)
}

pub(crate) fn load(sandbox: &Sandbox, bytes: &[u8]) -> Result<Arc<Plugin>, LoadError> {
    sandbox.load("guest", bytes, &PluginSettings::default(), Origin::Shipped)
}

/// A core module with the type of `world` embedded. `more_wit` declares other packages.
pub(crate) fn core_module(world: &str, more_wit: &str, wat: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../wit");
    let (mut package, _) = resolve.push_dir(folder).unwrap();
    if !more_wit.is_empty() {
        package = resolve.push_str("more.wit", more_wit).unwrap();
    }
    let world = resolve.select_world(&[package], Some(world)).unwrap();
    let mut module = wat::parse_str(wat).unwrap();
    wit_component::embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)
        .unwrap();
    module
}

/// What a template guest needs beside its `render`. Memory layout: 1024 zeros, which read as an
/// empty `info` and as "configured"; 2048 the answer, a prompt of the segments at 4096: image 0,
/// then the text at 8192.
const TEMPLATE: &str = r#"
  (import "visor:plugin/template-input@0.1.0" "[resource-drop]conversation"
    (func $drop_conversation (param i32)))
  (import "visor:plugin/model@0.1.0" "[resource-drop]handle" (func $drop_model (param i32)))
  (memory (export "memory") 64)
  (table $table 10 funcref)
  (global $seen (mut i32) (i32.const 0))
  (global $next (mut i32) (i32.const 65536))
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $next) (i32.const 7)) (i32.const -8)))
    (global.set $next (i32.add (local.get $at) (local.get 3)))
    (local.get $at))
  (func (export "visor:plugin/lifecycle@0.1.0#describe") (result i32) (i32.const 1024))
  (func (export "visor:plugin/lifecycle@0.1.0#configure") (param i32 i32) (result i32)
    (i32.const 1024))
  (func $deep (call $deep) (call $deep))
  (func $forget (param $conversation i32) (param $model i32)
    (call $drop_conversation (local.get $conversation))
    (call $drop_model (local.get $model)))
  (data (i32.const 2052) "\00\10\00\00\02\00\00\00")
  (data (i32.const 4096) "\02\00\00\00\00\00\00\00\00\00\00\00")
  (data (i32.const 4108) "\00\00\00\00\00\20\00\00\02\00\00\00")
  (data (i32.const 8192) "hi")
"#;

/// A template that is good while there is an image, as in the trial, and runs `body` when there is
/// none. The body leaves nothing on the stack; after it the good answer is given.
pub(crate) fn template(imports: &str, body: &str) -> Vec<u8> {
    let wat = template_wat(imports, body);
    core_module("template-plugin", "", &wat)
}

pub(crate) fn template_wat(imports: &str, body: &str) -> String {
    format!(
        r#"(module
  {imports}
  (import "visor:plugin/template-input@0.1.0" "[method]conversation.image-count"
    (func $image_count (param i32) (result i32)))
  {TEMPLATE}
  (func (export "visor:plugin/template@0.1.0#render") (param $conversation i32) (param $model i32)
      (result i32)
    (local $i i32)
    (if (i32.eq (call $image_count (local.get $conversation)) (i32.const 0))
      (then
        (i32.store (i32.const 2052) (i32.const 4108))
        (i32.store (i32.const 2056) (i32.const 1))
        {body}))
    (call $forget (local.get $conversation) (local.get $model))
    (i32.const 2048)))"#
    )
}

/// A conversation without images: the hand-written templates misbehave on it.
pub(crate) fn conversation(request_id: &str) -> Conversation {
    Conversation {
        messages: vec![Message {
            role: ChatRole::User,
            parts: vec![Part::Text("hello".to_owned())],
        }],
        tools: Vec::new(),
        image_tokens: Vec::new(),
        budget_tokens: 100,
        open_turn: true,
        extensions: Vec::new(),
        model: Arc::new(SampleModel),
        request_id: request_id.to_owned(),
    }
}
