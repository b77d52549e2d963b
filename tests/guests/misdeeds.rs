//! What a hostile guest of any role can do, and how a test orders it.
//!
//! A misbehaving guest behaves until its configuration says otherwise:
//! `{ "do": "spin", "in": "render", "on": "please" }` does the deed `spin` whenever the host calls
//! `render` for something that has `please` in it. Without `in` it is the role's main function;
//! without `on` it is every call, so also the trial run when the plugin is loaded. So a handful of
//! components covers every deed in every call.

use std::cell::RefCell;
use std::hint::black_box;

thread_local! {
    static ORDER: RefCell<Order> = const { RefCell::new(Order::none()) };
}

/// One misdeed and where it is done.
struct Order {
    deed: String,
    /// Empty for the role's main function.
    function: String,
    /// Has to occur in what the call is about; empty occurs everywhere.
    word: String,
}

impl Order {
    const fn none() -> Self {
        Self {
            deed: String::new(),
            function: String::new(),
            word: String::new(),
        }
    }
}

/// Takes the order from a plugin's configuration.
pub fn configure(config: &str) {
    let value = |key| string_value(config, key).unwrap_or_default();
    ORDER.replace(Order {
        deed: value("do"),
        function: value("in"),
        word: value("on"),
    });
}

/// As [`deed`], in the function that is meant when the order names none. `about` is what the call
/// is about: the client's text, the hints, the route.
pub fn main_deed(function: &str, about: &str) -> String {
    let deed = ORDER.with_borrow(|order| {
        let is_here = order.function.is_empty() || order.function == function;
        let is_now = about.contains(&order.word);
        if is_here && is_now {
            order.deed.clone()
        } else {
            String::new()
        }
    });
    carry_out(function, deed)
}

/// The deed ordered for this function, after doing it if any guest could.
pub fn deed(function: &str) -> String {
    let deed = ORDER.with_borrow(|order| {
        if order.function == function {
            order.deed.clone()
        } else {
            String::new()
        }
    });
    carry_out(function, deed)
}

fn carry_out(function: &str, deed: String) -> String {
    match deed.as_str() {
        "spin" => spin(),
        "hoard" => hoard(),
        "trap" => panic!("this guest was told to trap in {function}"),
        "recurse" => drop(recurse(1)),
        _ => {}
    }
    deed
}

/// Never returns.
fn spin() {
    let mut count = 0_u64;
    loop {
        count = black_box(count.wrapping_add(1));
    }
}

/// Allocates, and writes to, more and more memory.
fn hoard() {
    let mut hoarded = Vec::new();
    loop {
        hoarded.push(black_box(vec![1_u8; 1 << 20]));
    }
}

/// Uses up the stack.
fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    // Never true, but the compiler cannot know.
    if frame[0] == 0 {
        0
    } else {
        recurse(depth + 1).wrapping_add(frame[1])
    }
}

/// A string that no host should want to copy.
pub fn huge_string() -> String {
    "x".repeat(8 << 20)
}

/// The string at a top-level key: enough JSON for what tests configure.
fn string_value(json: &str, key: &str) -> Option<String> {
    let (_, after) = json.split_once(&format!("\"{key}\""))?;
    let value = after
        .trim_start()
        .strip_prefix(':')?
        .trim_start()
        .strip_prefix('"')?;
    value.split_once('"').map(|(value, _)| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_for_one_function_and_one_word() {
        configure(r#"{ "do" : "lie", "in":"advance" }"#);
        assert_eq!(
            (deed("advance").as_str(), main_deed("start", "").as_str()),
            ("lie", "")
        );
        configure(r#"{"do":"lie","on":"please"}"#);
        assert_eq!(deed("advance"), "");
        assert_eq!(main_deed("start", "now"), "");
        assert_eq!(main_deed("start", "now, please"), "lie");
        configure("{}");
        assert_eq!(main_deed("start", ""), "");
    }
}
