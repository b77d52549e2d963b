//! From OpenMetrics, which the registry writes, to the Prometheus text format, which most ask for.

/// Content type of the Prometheus text format.
pub const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Content type of OpenMetrics.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The same series in the Prometheus format 0.0.4: there a counter's HELP and TYPE lines carry the
/// name its samples have, with `_total`, and nothing marks the end.
pub(super) fn to_prometheus(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len() + 1024);
    let mut lines = openmetrics.lines().peekable();
    while let Some(line) = lines.next() {
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        let next_is_counter = lines
            .peek()
            .is_some_and(|next| counter_name(next).is_some());
        if let Some(name) = counter_name(line) {
            text.push_str(&format!("# TYPE {name}_total counter\n"));
        } else if let Some(help) = line.strip_prefix("# HELP ").filter(|_| next_is_counter) {
            let (name, words) = help.split_once(' ').unwrap_or((help, ""));
            text.push_str(&format!("# HELP {name}_total {words}\n"));
        } else {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

fn counter_name(line: &str) -> Option<&str> {
    line.strip_prefix("# TYPE ")?.strip_suffix(" counter")
}
