//! A template for a contract this host does not speak: `visor:plugin@0.3.0`. It must be refused when
//! it is loaded, with a message that names both versions.

#![expect(missing_docs, reason = "what `generate!` makes is documented below")]

wit_bindgen::generate!({
    inline: r#"
        package visor:plugin@0.3.0;

        interface lifecycle {
            record info { name: string, version: string, description: string, config-schema: option<string> }
            record issue { path: string, message: string }
            describe: func() -> info;
            configure: func(config: string) -> result<_, list<issue>>;
        }

        /// Quite another template: it turns one string into one string.
        interface template {
            render: func(conversation: string) -> string;
        }

        world template-plugin {
            export lifecycle;
            export template;
        }
    "#,
});

use exports::visor::plugin::{lifecycle, template};

struct Other;

#[cfg(target_arch = "wasm32")]
export!(Other);

impl lifecycle::Guest for Other {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "other-track".to_owned(),
            version: "1".to_owned(),
            description: "for another contract".to_owned(),
            config_schema: None,
        }
    }

    fn configure(_config: String) -> Result<(), Vec<lifecycle::Issue>> {
        Ok(())
    }
}

impl template::Guest for Other {
    fn render(conversation: String) -> String {
        conversation
    }
}
