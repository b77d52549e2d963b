//! From what is read here to the types of the interfaces. Every adapter has bindings of its own, generated in its crate, so the
//! conversions are written there: by this macro, which takes the interface's names from where it is used.

/// `into_bindings!(Wrong)`, and `Format`, `Tool`, `Choice` likewise: the conversion of one type into the `Error`, `OutputFormat`,
/// `ToolSpec` or `ToolChoice` in scope.
#[macro_export]
macro_rules! into_bindings {
    (Wrong) => {
        impl From<$crate::Wrong> for Error {
            fn from(wrong: $crate::Wrong) -> Self {
                Self {
                    code: match wrong.kind {
                        $crate::Kind::Invalid => ErrorCode::InvalidRequest,
                        $crate::Kind::Unsupported => ErrorCode::Unsupported,
                    },
                    message: wrong.message,
                    param: wrong.param,
                    retry_after: None,
                }
            }
        }
    };
    (Format) => {
        impl From<$crate::Format> for OutputFormat {
            fn from(format: $crate::Format) -> Self {
                match format {
                    $crate::Format::Text => Self::Text,
                    $crate::Format::Json => Self::Json,
                    $crate::Format::Schema { text, .. } => Self::JsonSchema(text),
                    $crate::Format::Regex(pattern) => Self::Regex(pattern),
                }
            }
        }
    };
    (Tool) => {
        impl From<$crate::Tool> for ToolSpec {
            fn from(tool: $crate::Tool) -> Self {
                Self {
                    name: tool.name,
                    description: tool.description,
                    parameters: tool.parameters,
                }
            }
        }
    };
    (Choice) => {
        impl From<$crate::Choice> for ToolChoice {
            fn from(choice: $crate::Choice) -> Self {
                match choice {
                    // Tools that are not to be called are not offered.
                    $crate::Choice::None | $crate::Choice::Auto => Self::Auto,
                    $crate::Choice::Required => Self::Required,
                    $crate::Choice::Named(name) => Self::Named(name),
                }
            }
        }
    };
}
