//! The plugins inside the binary. A file of the same name in the plugin folder replaces one.

use visor_sandbox::Shipped;

/// Every shipped plugin: one per role.
#[must_use]
pub fn plugins() -> Vec<Shipped> {
    vec![
        Shipped {
            id: "openai",
            bytes: include_bytes!("../../../../plugins/built/openai.wasm"),
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
