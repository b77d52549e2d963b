//! The component type that a compiler embeds in a core module, checked before wit-component reads
//! it: it follows the packages' dependencies by recursion and would not return from a cycle.
//!
//! Text cannot say such a type, bytes can. What one interface takes from another is spelled out as
//! aliases, so the packages' dependencies can be read off without understanding the types.

use std::collections::{BTreeMap, BTreeSet};

use wasmparser::{
    ComponentAlias, ComponentExternalKind, ComponentOuterAliasKind, ComponentType,
    ComponentTypeDeclaration, ComponentTypeRef, InstanceTypeDeclaration, Parser, Payload,
    TypeBounds,
};

use crate::error::LoadError;
use crate::load::wrap::{malformed, validate};

/// Name prefix of the custom sections that wit-bindgen writes.
const SECTION_PREFIX: &str = "component-type";

type Packages = BTreeSet<String>;
/// Which packages a package takes types from.
type Graph = BTreeMap<String, Packages>;

/// Refuses embedded types that are malformed or whose packages depend on each other in a circle.
pub(crate) fn check(module: &[u8]) -> Result<(), LoadError> {
    for payload in Parser::new(0).parse_all(module) {
        let payload = payload.map_err(|error| malformed(&error, module))?;
        let Payload::CustomSection(section) = payload else {
            continue;
        };
        if section.name().starts_with(SECTION_PREFIX) {
            check_section(section.data())?;
        }
    }
    Ok(())
}

fn check_section(component: &[u8]) -> Result<(), LoadError> {
    let unusable = |message: String| LoadError::NotComponent(message);
    validate(component).map_err(|error| unusable(error.to_string()))?;
    let mut graph = Graph::new();
    let read = |error| unusable(malformed(&error, component).to_string());
    for payload in Parser::new(0).parse_all(component) {
        let Payload::ComponentTypeSection(types) = payload.map_err(read)? else {
            continue;
        };
        for ty in types {
            used_by_type(&ty.map_err(read)?, &mut Vec::new(), &mut graph);
        }
    }
    match circle(graph) {
        None => Ok(()),
        Some(package) => Err(unusable(format!(
            "its package `{package}` depends on itself through others"
        ))),
    }
}

/// One level of nested types: for each type and instance index, the packages behind it.
#[derive(Default)]
struct Scope {
    types: Vec<Packages>,
    instances: Vec<Packages>,
}

/// Packages that `ty` takes types from; what its imports and exports say goes to `graph`.
fn used_by_type(ty: &ComponentType<'_>, outer: &mut Vec<Scope>, graph: &mut Graph) -> Packages {
    match ty {
        ComponentType::Component(declarations) => {
            outer.push(Scope::default());
            let mut used = Packages::new();
            for declaration in declarations {
                used.extend(used_by_component(declaration, outer, graph));
            }
            outer.pop();
            used
        }
        ComponentType::Instance(declarations) => {
            outer.push(Scope::default());
            let mut used = Packages::new();
            for declaration in declarations {
                used.extend(used_by_instance(declaration, outer, graph));
            }
            outer.pop();
            used
        }
        // They name types of their own scope by index; all of those are taken to be meant.
        ComponentType::Defined(_) | ComponentType::Func(_) => outer
            .last()
            .into_iter()
            .flat_map(|scope| &scope.types)
            .flatten()
            .cloned()
            .collect(),
        ComponentType::Resource { .. } => Packages::new(),
    }
}

fn used_by_component(
    declaration: &ComponentTypeDeclaration<'_>,
    outer: &mut Vec<Scope>,
    graph: &mut Graph,
) -> Packages {
    match declaration {
        ComponentTypeDeclaration::CoreType(_) => Packages::new(),
        ComponentTypeDeclaration::Type(ty) => declare_type(ty, outer, graph),
        ComponentTypeDeclaration::Alias(alias) => used_by_alias(alias, outer),
        ComponentTypeDeclaration::Import(import) => declare(
            import.name.name,
            import.name.implements,
            &import.ty,
            outer,
            graph,
        ),
        ComponentTypeDeclaration::Export { name, ty } => {
            declare(name.name, name.implements, ty, outer, graph)
        }
    }
}

fn used_by_instance(
    declaration: &InstanceTypeDeclaration<'_>,
    outer: &mut Vec<Scope>,
    graph: &mut Graph,
) -> Packages {
    match declaration {
        InstanceTypeDeclaration::CoreType(_) => Packages::new(),
        InstanceTypeDeclaration::Type(ty) => declare_type(ty, outer, graph),
        InstanceTypeDeclaration::Alias(alias) => used_by_alias(alias, outer),
        InstanceTypeDeclaration::Export { name, ty } => {
            declare(name.name, name.implements, ty, outer, graph)
        }
    }
}

fn declare_type(ty: &ComponentType<'_>, outer: &mut Vec<Scope>, graph: &mut Graph) -> Packages {
    let used = used_by_type(ty, outer, graph);
    if let Some(scope) = outer.last_mut() {
        scope.types.push(used.clone());
    }
    used
}

fn used_by_alias(alias: &ComponentAlias<'_>, outer: &mut [Scope]) -> Packages {
    let used = match *alias {
        ComponentAlias::InstanceExport { instance_index, .. } => {
            let scope = outer.last();
            scope
                .and_then(|scope| scope.instances.get(instance_index as usize))
                .cloned()
        }
        ComponentAlias::Outer {
            kind: ComponentOuterAliasKind::Type,
            count,
            index,
        } => {
            let scope = outer.iter().rev().nth(count as usize);
            scope
                .and_then(|scope| scope.types.get(index as usize))
                .cloned()
        }
        _ => None,
    };
    let used = used.unwrap_or_default();
    if let Some(scope) = outer.last_mut() {
        match alias {
            ComponentAlias::InstanceExport {
                kind: ComponentExternalKind::Type,
                ..
            }
            | ComponentAlias::Outer {
                kind: ComponentOuterAliasKind::Type,
                ..
            } => {
                scope.types.push(used.clone());
            }
            ComponentAlias::InstanceExport {
                kind: ComponentExternalKind::Instance,
                ..
            } => {
                scope.instances.push(used.clone());
            }
            _ => {}
        }
    }
    used
}

/// An import or export: an instance is of the package its name says, and depends on what its type
/// takes.
fn declare(
    name: &str,
    implements: Option<&str>,
    ty: &ComponentTypeRef,
    outer: &mut [Scope],
    graph: &mut Graph,
) -> Packages {
    let Some(scope) = outer.last_mut() else {
        return Packages::new();
    };
    let type_at = |index: u32| scope.types.get(index as usize).cloned().unwrap_or_default();
    match *ty {
        ComponentTypeRef::Instance(index) => {
            let mut used = type_at(index);
            let package = package_of(implements.unwrap_or(name));
            used.remove(&package);
            graph.entry(package.clone()).or_default().extend(used);
            let own = Packages::from([package]);
            scope.instances.push(own.clone());
            own
        }
        ComponentTypeRef::Type(bounds) => {
            let used = match bounds {
                TypeBounds::Eq(index) => type_at(index),
                TypeBounds::SubResource => Packages::new(),
            };
            scope.types.push(used.clone());
            used
        }
        ComponentTypeRef::Component(index) => {
            // A world: its package depends on those of all its imports and exports.
            let mut used = type_at(index);
            let package = package_of(name);
            used.remove(&package);
            graph
                .entry(package)
                .or_default()
                .extend(used.iter().cloned());
            used
        }
        ComponentTypeRef::Func(index) => type_at(index),
        ComponentTypeRef::Module(_) | ComponentTypeRef::Value(_) => Packages::new(),
    }
}

/// `ns:package@version` of `ns:package/interface@version`; inline interfaces have a plain name
/// and belong to the world's own package.
fn package_of(name: &str) -> String {
    match name.split_once('/') {
        None => String::new(),
        Some((package, rest)) => match rest.split_once('@') {
            None => package.to_owned(),
            Some((_, version)) => format!("{package}@{version}"),
        },
    }
}

/// A package that takes part in a circle or depends on one, if there is one.
fn circle(mut graph: Graph) -> Option<String> {
    loop {
        // Whatever depends on nothing that is left is no part of a circle.
        let free: Vec<String> = graph
            .iter()
            .filter(|(_, used)| used.iter().all(|package| !graph.contains_key(package)))
            .map(|(package, _)| package.clone())
            .collect();
        if free.is_empty() {
            return graph.into_keys().next();
        }
        for package in free {
            graph.remove(&package);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_wat(world: &str) -> Result<(), LoadError> {
        let wat = format!(
            r#"(component (type (component (type (component {world}))
                (export "a:b/world" (component (type 0))))))"#
        );
        check_section(&wat::parse_str(wat).unwrap())
    }

    const A_THEN_B: &str = r#"
        (type (instance (type (record (field "x" u8))) (export "t" (type (eq 0)))))
        (import "a:a/one@0.1.0" (instance (type 0)))
        (alias export 0 "t" (type))
        (type (instance (alias outer 1 1 (type)) (export "t" (type (eq 0)))))
        (import "b:b/one@0.1.0" (instance (type 2)))
        (alias export 1 "t" (type))
        (type (instance (alias outer 1 3 (type)) (export "t" (type (eq 0)))))"#;

    #[test]
    fn packages_that_depend_in_a_circle_are_refused() {
        check_wat(&format!(
            r#"{A_THEN_B} (import "c:c/one" (instance (type 4)))"#
        ))
        .unwrap();
        check_wat(&format!(
            r#"{A_THEN_B} (import "b:b/two@0.1.0" (instance (type 4)))"#
        ))
        .unwrap();
        check_wat(&format!(
            r#"{A_THEN_B} (import "a:a/two@0.2.0" (instance (type 4)))"#
        ))
        .unwrap();
        let circle = format!(r#"{A_THEN_B} (import "a:a/two@0.1.0" (instance (type 4)))"#);
        let error = check_wat(&circle).unwrap_err().to_string();
        assert!(error.contains("`a:a@0.1.0` depends on itself"), "{error}");
        // The world's own package takes part: `a:b` is the world's, and `b:b` takes from it.
        let with_world = A_THEN_B.replace("a:a/one@0.1.0", "a:b/one");
        assert!(check_wat(&with_world).is_err());
    }
}
