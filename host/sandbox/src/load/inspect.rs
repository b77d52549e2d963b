//! What a component exports and imports, by name, before it is compiled.

use wasmparser::{ComponentExternalKind, Parser, Payload};

use crate::error::LoadError;
use crate::options::Role;
use crate::plugin::ServedRole;

/// The track of `wit/` that this server speaks. Within it, versions are compatible.
const TRACK: &str = "0.1";
const PACKAGE: &str = "visor:plugin";
/// What every plugin may import.
const COMMON_IMPORTS: [&str; 5] = ["types", "log", "metrics", "clock", "store"];
/// WASI packages that are there, empty, for toolchains that cannot do without.
const WASI_PACKAGES: [&str; 6] = [
    "wasi:cli",
    "wasi:clocks",
    "wasi:filesystem",
    "wasi:io",
    "wasi:random",
    "wasi:sockets",
];

/// Names of a component that fit this server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Surface {
    pub(crate) roles: Vec<ServedRole>,
    pub(crate) imports: Vec<String>,
    pub(crate) needs_wasi: bool,
}

/// What `role` may import beside the common interfaces.
fn role_imports(role: Role) -> &'static [&'static str] {
    match role {
        Role::Adapter => &["model", "media", "adapter-input"],
        Role::Template => &["model", "template-input"],
        Role::ImagePolicy => &["model", "media", "image-policy-input"],
        Role::CacheStrategy => &["cache-strategy-input"],
    }
}

/// Reads the outermost imports and exports of a valid component.
pub(crate) fn inspect(component: &[u8]) -> Result<Surface, LoadError> {
    let (imports, exports) =
        names(component).map_err(|error| LoadError::Malformed(error.to_string()))?;
    let roles = roles(&exports)?;
    let mut needs_wasi = false;
    for import in &imports {
        match Name::parse(import) {
            Some(name) if name.package == PACKAGE => check_own(import, &name, &roles)?,
            Some(name) if WASI_PACKAGES.contains(&name.package) => {
                check_wasi(import, &name)?;
                needs_wasi = true;
            }
            _ => return Err(LoadError::Import(unknown_import(import, &roles))),
        }
    }
    Ok(Surface {
        roles,
        imports,
        needs_wasi,
    })
}

fn names(component: &[u8]) -> wasmparser::Result<(Vec<String>, Vec<String>)> {
    let (mut imports, mut exports) = (Vec::new(), Vec::new());
    let mut depth = 0_u32;
    for payload in Parser::new(0).parse_all(component) {
        match payload? {
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::ComponentImportSection(section) if depth == 0 => {
                for import in section {
                    imports.push(import?.name.name.to_owned());
                }
            }
            Payload::ComponentExportSection(section) if depth == 0 => {
                for export in section {
                    let export = export?;
                    if export.kind == ComponentExternalKind::Instance {
                        exports.push(export.name.name.to_owned());
                    }
                }
            }
            _ => {}
        }
    }
    Ok((imports, exports))
}

/// `package/interface@version`, the version possibly empty.
struct Name<'a> {
    package: &'a str,
    interface: &'a str,
    version: &'a str,
}

impl<'a> Name<'a> {
    fn parse(name: &'a str) -> Option<Self> {
        let (path, version) = name.split_once('@').unwrap_or((name, ""));
        let (package, interface) = path.split_once('/')?;
        Some(Self {
            package,
            interface,
            version,
        })
    }

    /// `0.1` of `0.1.3`: before 1.0 every minor version is a track of its own.
    fn is_on(&self, track: &str) -> bool {
        let rest = self.version.strip_prefix(track);
        rest.is_some_and(|rest| rest.starts_with('.'))
    }
}

fn roles(exports: &[String]) -> Result<Vec<ServedRole>, LoadError> {
    let mut roles = Vec::new();
    let mut others = Vec::new();
    let mut has_lifecycle = false;
    for export in exports {
        let Some(name) = Name::parse(export).filter(|name| name.package == PACKAGE) else {
            continue;
        };
        let role = Role::ALL
            .into_iter()
            .find(|role| role.interface() == name.interface);
        match role {
            _ if !name.is_on(TRACK) => others.push(export.as_str()),
            Some(role) => {
                roles.push(ServedRole {
                    role,
                    version: name.version.to_owned(),
                });
            }
            None => has_lifecycle |= name.interface == "lifecycle",
        }
    }
    if !others.is_empty() {
        let message = format!(
            "exports {}; this server offers {TRACK}",
            others.join(" and ")
        );
        return Err(LoadError::NoRole(message));
    }
    if roles.is_empty() {
        return Err(LoadError::NoRole(no_role(exports)));
    }
    if !has_lifecycle {
        return Err(LoadError::NoRole(format!(
            "does not export {PACKAGE}/lifecycle@{TRACK}, which every plugin must"
        )));
    }
    Ok(roles)
}

fn no_role(exports: &[String]) -> String {
    let wanted: Vec<&str> = Role::ALL.into_iter().map(Role::interface).collect();
    let found = if exports.is_empty() {
        "nothing".to_owned()
    } else {
        exports.join(", ")
    };
    format!(
        "exports {found}; a plugin exports {PACKAGE}/<{}>@{TRACK}",
        wanted.join("|")
    )
}

fn check_own(import: &str, name: &Name<'_>, roles: &[ServedRole]) -> Result<(), LoadError> {
    if !name.is_on(TRACK) {
        return Err(LoadError::Import(format!(
            "imports {import}; this server offers {TRACK}"
        )));
    }
    let granted = COMMON_IMPORTS.contains(&name.interface)
        || roles
            .iter()
            .any(|served| role_imports(served.role).contains(&name.interface));
    if granted {
        Ok(())
    } else {
        Err(LoadError::Import(unknown_import(import, roles)))
    }
}

fn check_wasi(import: &str, name: &Name<'_>) -> Result<(), LoadError> {
    if name.is_on("0.2") {
        return Ok(());
    }
    Err(LoadError::Import(format!(
        "imports {import}; this server offers an empty WASI 0.2: build for \
         wasm32-unknown-unknown, which needs none"
    )))
}

fn unknown_import(import: &str, roles: &[ServedRole]) -> String {
    let names: Vec<String> = roles.iter().map(|served| served.role.to_string()).collect();
    let mut offered: Vec<&str> = COMMON_IMPORTS.to_vec();
    for served in roles {
        for import in role_imports(served.role) {
            if !offered.contains(import) {
                offered.push(import);
            }
        }
    }
    format!(
        "imports {import}, which is not there for a plugin that is {}; this server offers \
         {PACKAGE}/<{}>@{TRACK}",
        names.join(" and "),
        offered.join("|")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn surface(exports: &[&str], imports: &[&str]) -> Result<Surface, String> {
        use std::fmt::Write;
        let mut wat = "(component (instance $i)".to_owned();
        for import in imports {
            write!(wat, "(import \"{import}\" (instance))").unwrap();
        }
        for export in exports {
            write!(wat, "(export \"{export}\" (instance $i))").unwrap();
        }
        wat.push(')');
        let bytes = wat::parse_str(&wat).unwrap();
        inspect(&bytes).map_err(|error| error.to_string())
    }

    const LIFECYCLE: &str = "visor:plugin/lifecycle@0.1.0";

    #[test]
    fn roles_are_found_by_exported_interface_and_extra_exports_are_ignored() {
        let found = surface(
            &[
                LIFECYCLE,
                "visor:plugin/template@0.1.7",
                "other:thing/x",
                "init",
            ],
            &["visor:plugin/log@0.1.2", "wasi:io/poll@0.2.3"],
        )
        .unwrap();
        assert_eq!(
            found.roles,
            [ServedRole {
                role: Role::Template,
                version: "0.1.7".to_owned()
            }]
        );
        assert!(found.needs_wasi);
    }

    #[test]
    fn messages_name_interface_wanted_and_offered() {
        let template = "visor:plugin/template@0.1.0";
        for (exports, imports, message) in [
            (
                &["visor:plugin/adapter@0.3.0"][..],
                &[][..],
                "exports visor:plugin/adapter@0.3.0; this server offers 0.1",
            ),
            (
                &["a:b/c@1.0.0"],
                &[],
                "exports a:b/c@1.0.0; a plugin exports \
                 visor:plugin/<adapter|template|image-policy|cache-strategy>@0.1",
            ),
            (&[], &[], "exports nothing; a plugin exports visor:plugin/<"),
            (
                &[template],
                &[],
                "does not export visor:plugin/lifecycle@0.1",
            ),
            (
                &[LIFECYCLE, template],
                &["visor:plugin/model@0.10.0"],
                "imports visor:plugin/model@0.10.0; this server offers 0.1",
            ),
            (
                &[LIFECYCLE, template],
                &["visor:plugin/media@0.1.0"],
                "imports visor:plugin/media@0.1.0, which is not there for a plugin that is \
                 template; this server offers \
                 visor:plugin/<types|log|metrics|clock|store|model|template-input>@0.1",
            ),
            (
                &[LIFECYCLE, template],
                &["wasi:http/types@0.2.0"],
                "imports wasi:http/types@0.2.0",
            ),
            (
                &[LIFECYCLE, template],
                &["wasi:io/poll@0.3.0"],
                "offers an empty WASI 0.2",
            ),
            (
                &[LIFECYCLE, template],
                &["env"],
                "imports env, which is not there",
            ),
        ] {
            let said = surface(exports, imports).unwrap_err();
            assert!(said.contains(message), "{said}");
        }
    }
}
