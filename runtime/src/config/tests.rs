// SPDX-License-Identifier: Apache-2.0
use bulkhead_vmm_api::Pages;

use super::*;
use crate::error::chain;

struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new(main: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.toml"), main).unwrap();
        Self { dir }
    }

    fn drop_in(self, name: &str, text: &str) -> Self {
        let dir = self.dir.path().join("config.d");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(name), text).unwrap();
        self
    }

    fn load(&self) -> Result<Config, ConfigError> {
        Config::load(Some(&self.dir.path().join("config.toml")))
    }

    fn refused(&self) -> String {
        chain(&self.load().unwrap_err())
    }
}

#[test]
fn what_is_not_named_has_its_default() {
    let config = Files::new("[hypervisor]\nvcpus = 4\n").load().unwrap();
    assert_eq!(config.hypervisor.vcpus, 4);
    let defaults = Config::default();
    assert_eq!(config.hypervisor.memory_mib, defaults.hypervisor.memory_mib);
    assert_eq!(config.runtime, defaults.runtime);
}

#[test]
fn drop_ins_override_in_the_order_of_their_names() {
    let config = Files::new("[hypervisor]\nvcpus = 1\nmemory_mib = 512\n")
        .drop_in("20.toml", "[hypervisor]\nvcpus = 3\n")
        .drop_in("10.toml", "[hypervisor]\nvcpus = 2\n")
        .drop_in("notes", "not toml")
        .load()
        .unwrap();
    assert_eq!(config.hypervisor.vcpus, 3);
    assert_eq!(config.hypervisor.memory_mib, 512);
}

#[test]
fn an_unknown_key_is_named_with_its_nearest() {
    let text = Files::new("[hypervisor]\nmemory_mb = 1\n").refused();
    assert!(
        text.contains("config.toml: unknown key \"hypervisor.memory_mb\""),
        "{text}"
    );
    assert!(
        text.contains("did you mean \"hypervisor.memory_mib\""),
        "{text}"
    );
    let text = Files::new("vcpus = 1\n").refused();
    assert!(text.contains("did you mean \"hypervisor.vcpus\""), "{text}");
    let text = Files::new("[hipervisor]\nvcpus = 1\n").refused();
    assert!(text.contains("did you mean \"hypervisor\""), "{text}");
    let text = Files::new("")
        .drop_in("x.toml", "[agent]\nqwertyuiop = 1")
        .refused();
    assert!(
        text.contains("x.toml: unknown key") && !text.contains("mean"),
        "{text}"
    );
}

#[test]
fn wrong_types_and_values_are_named() {
    let text = Files::new("[hypervisor]\nvcpus = \"two\"\n").refused();
    assert!(
        text.ends_with("config.toml: hypervisor.vcpus: expected a whole number, found \"two\""),
        "{text}"
    );
    let text = Files::new("[hypervisor]\nvcpus = 0\n").refused();
    assert!(
        text.ends_with("hypervisor.vcpus: 0 is not within 1 to 64"),
        "{text}"
    );
    let text = Files::new("[hypervisor]\nkernel = \"vmlinux\"\n").refused();
    assert!(
        text.contains("hypervisor.kernel: \"vmlinux\" is not an absolute path"),
        "{text}"
    );
    let text = Files::new("[runtime]\nlog_level = \"loud\"\n").refused();
    assert!(text.contains("loud"), "{text}");
    let text = Files::new("[hypervisor\n").refused();
    assert!(text.contains("config.toml"), "{text}");
}

#[test]
fn a_named_file_must_exist_and_the_default_need_not() {
    let absent = Path::new("/nonexistent/config.toml");
    assert!(matches!(
        Config::load(Some(absent)),
        Err(ConfigError::Read { .. })
    ));
    assert_eq!(
        Loaded::load_from(absent, false).unwrap().config,
        Config::default()
    );
}

#[test]
fn merge_groups_are_names() {
    let config =
        Files::new("[hypervisor]\nmerge_group = \"red\"\nallowed_merge_groups = [\"blue\"]\n");
    let hypervisor = config.load().unwrap().hypervisor;
    assert_eq!(hypervisor.merge_group, Some("red".parse().unwrap()));
    assert_eq!(hypervisor.allowed_merge_groups, ["blue".parse().unwrap()]);
    let none = config.drop_in("off.toml", "[hypervisor]\nmerge_group = \"\"\n");
    assert_eq!(none.load().unwrap().hypervisor.merge_group, None);
    assert_eq!(Config::default().hypervisor.merge_group, None);
    for (key, value) in [
        ("merge_group", "\"a b\""),
        ("allowed_merge_groups", "[\"a\", \"\"]"),
    ] {
        let text = Files::new(&format!("[hypervisor]\n{key} = {value}\n")).refused();
        assert!(text.contains(&format!("hypervisor.{key}: ")), "{text}");
    }
}

#[test]
fn every_key_can_be_told_and_read_back() {
    let mut config = Config::default();
    let mut names = std::collections::BTreeSet::new();
    for key in KEYS {
        let value = key.get(&config);
        key.set(&mut config, &value)
            .unwrap_or_else(|problem| panic!("{}: {problem}", key.name));
        assert!(names.insert(key.name), "{} is there twice", key.name);
        assert!(key.help.ends_with('.'), "{}", key.name);
    }
    assert_eq!(config, Config::default());
}

#[test]
fn it_is_told_where_a_value_comes_from() {
    let files = Files::new("[hypervisor]\nvcpus = 2\nmemory_mib = 512\n")
        .drop_in("10.toml", "[hypervisor]\nvcpus = 3\n");
    let loaded = Loaded::load(Some(&files.dir.path().join("config.toml"))).unwrap();
    let origin = |name: &str| loaded.origin(Key::named(name).unwrap()).to_string();
    assert!(origin("hypervisor.vcpus").ends_with("config.d/10.toml"));
    assert!(origin("hypervisor.memory_mib").ends_with("config.toml"));
    assert_eq!(origin("hypervisor.max_vcpus"), "default");
    assert_eq!(loaded.files.len(), 2);
}

#[test]
fn a_section_is_no_value_and_an_annotation_must_exist() {
    let text = Files::new("hypervisor = 3\n").refused();
    assert!(text.contains("hypervisor: is a section"), "{text}");
    let text = Files::new("[runtime]\nallowed_annotations = [\"io.bulkhead.hypervisor.path\"]\n")
        .refused();
    assert!(
        text.contains("runtime.allowed_annotations: \"io.bulkhead.hypervisor.path\" is none of: "),
        "{text}"
    );
    let text = Files::new("[debug]\nfail_at = \"lunch\"\n").refused();
    assert!(
        text.contains("debug.fail_at: \"lunch\" is none of: "),
        "{text}"
    );
}

#[test]
fn a_text_is_read_as_the_keys_type() {
    let mut config = Config::default();
    let mut set = |name: &str, text: &str| Key::named(name).unwrap().set_text(&mut config, text);
    set("hypervisor.vcpus", " 3 ").unwrap();
    set("hypervisor.free_page_reporting", "false").unwrap();
    set("hypervisor.pages", "huge").unwrap();
    set("hypervisor.kernel_params", "quiet").unwrap();
    assert_eq!(
        set("hypervisor.vcpus", "x").unwrap_err(),
        "\"x\" is not a whole number from 1 to 64"
    );
    assert_eq!(
        set("hypervisor.vcpus", "65").unwrap_err(),
        "65 is not within 1 to 64"
    );
    assert_eq!(
        set("hypervisor.free_page_reporting", "1").unwrap_err(),
        "\"1\" is neither true nor false"
    );
    assert_eq!(
        set("hypervisor.pages", "true").unwrap_err(),
        "\"true\" is none of: small, transparent, huge"
    );
    assert!(set("hypervisor.kernel_params", "a\nb").is_err());
    assert_eq!(config.hypervisor.vcpus, 3);
    assert!(!config.hypervisor.free_page_reporting);
    assert_eq!(config.hypervisor.pages, Pages::Huge);
}
