//! One `bindgen!` per world of `wit/`, nothing else.
//!
//! The adapter's world imports the most, so the others take the shared interfaces from it and
//! every host trait is implemented once.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    clippy::too_many_lines,
    clippy::too_many_arguments,
    reason = "generated from wit/, where the documentation is"
)]

pub(crate) mod common {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "common",
        imports: { default: trappable },
        with: {
            "visor:plugin/types@0.1.0": crate::bindings::adapter::visor::plugin::types,
            "visor:plugin/log@0.1.0": crate::bindings::adapter::visor::plugin::log,
            "visor:plugin/metrics@0.1.0": crate::bindings::adapter::visor::plugin::metrics,
            "visor:plugin/clock@0.1.0": crate::bindings::adapter::visor::plugin::clock,
            "visor:plugin/store@0.1.0": crate::bindings::adapter::visor::plugin::store,
        },
    });
}

pub(crate) mod adapter {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "adapter-plugin",
        imports: { default: trappable },
        with: {
            "visor:plugin/media.blob": crate::adapter::types::Blob,
            "visor:plugin/media.image": crate::host::image::RecordedImage,
            "visor:plugin/model.handle": crate::host::model::ModelHandle,
            "visor:plugin/model.tokenizer": crate::host::model::TokenizerHandle,
            "visor:plugin/store.bucket": crate::host::store::BucketHandle,
            "visor:plugin/adapter-input.request": crate::host::adapter_input::RequestHandle,
            "visor:plugin/adapter-input.form-part": crate::adapter::types::FormPart,
        },
    });
}

pub(crate) mod template {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "template-plugin",
        imports: { default: trappable },
        with: {
            "visor:plugin/types@0.1.0": crate::bindings::adapter::visor::plugin::types,
            "visor:plugin/log@0.1.0": crate::bindings::adapter::visor::plugin::log,
            "visor:plugin/metrics@0.1.0": crate::bindings::adapter::visor::plugin::metrics,
            "visor:plugin/clock@0.1.0": crate::bindings::adapter::visor::plugin::clock,
            "visor:plugin/store@0.1.0": crate::bindings::adapter::visor::plugin::store,
            "visor:plugin/model@0.1.0": crate::bindings::adapter::visor::plugin::model,
            "visor:plugin/template-input.conversation": crate::template::Conversation,
        },
    });
}

pub(crate) mod image_policy {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "image-policy-plugin",
        imports: { default: trappable },
        with: {
            "visor:plugin/types@0.1.0": crate::bindings::adapter::visor::plugin::types,
            "visor:plugin/log@0.1.0": crate::bindings::adapter::visor::plugin::log,
            "visor:plugin/metrics@0.1.0": crate::bindings::adapter::visor::plugin::metrics,
            "visor:plugin/clock@0.1.0": crate::bindings::adapter::visor::plugin::clock,
            "visor:plugin/store@0.1.0": crate::bindings::adapter::visor::plugin::store,
            "visor:plugin/model@0.1.0": crate::bindings::adapter::visor::plugin::model,
            "visor:plugin/media@0.1.0": crate::bindings::adapter::visor::plugin::media,
            "visor:plugin/image-policy-input.context": crate::image_policy::ImageContext,
        },
    });
}

pub(crate) mod cache_strategy {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "cache-strategy-plugin",
        imports: { default: trappable },
        with: {
            "visor:plugin/types@0.1.0": crate::bindings::adapter::visor::plugin::types,
            "visor:plugin/log@0.1.0": crate::bindings::adapter::visor::plugin::log,
            "visor:plugin/metrics@0.1.0": crate::bindings::adapter::visor::plugin::metrics,
            "visor:plugin/clock@0.1.0": crate::bindings::adapter::visor::plugin::clock,
            "visor:plugin/store@0.1.0": crate::bindings::adapter::visor::plugin::store,
            "visor:plugin/cache-strategy-input.lookup": crate::strategy::Lookup,
        },
    });
}
