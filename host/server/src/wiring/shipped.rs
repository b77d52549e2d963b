//! The plugins inside the binary. A file of the same name in the plugin folder replaces one.

use visor_sandbox::Shipped;

/// Every shipped plugin: an adapter per dialect, one of each other role.
#[must_use]
pub fn plugins() -> Vec<Shipped> {
    vec![
        Shipped {
            id: "openai",
            bytes: include_bytes!("../../../../plugins/built/openai.wasm"),
        },
        Shipped {
            id: "responses",
            bytes: include_bytes!("../../../../plugins/built/responses.wasm"),
        },
        Shipped {
            id: "anthropic",
            bytes: include_bytes!("../../../../plugins/built/anthropic.wasm"),
        },
        Shipped {
            id: "ollama",
            bytes: include_bytes!("../../../../plugins/built/ollama.wasm"),
        },
        Shipped {
            id: "phi3",
            bytes: include_bytes!("../../../../plugins/built/phi3.wasm"),
        },
        Shipped {
            id: "hd",
            bytes: include_bytes!("../../../../plugins/built/hd.wasm"),
        },
        Shipped {
            id: "lru",
            bytes: include_bytes!("../../../../plugins/built/lru.wasm"),
        },
    ]
}
