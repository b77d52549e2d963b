//! Config quirks that people have, and configs that are refused.

use super::*;
use serde_json::json;

/// A small but complete config.
fn base() -> Value {
    json!({
        "model_type": "phi3_v", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
        "rope_scaling": { "type": "su", "short_factor": [1, 1.5, 2, 3], "long_factor": [1.0, 4.0, 8.0, 64] },
        "eos_token_id": 2
    })
}

fn parse(value: &Value) -> Result<ModelConfig, ModelError> {
    ModelConfig::parse(value.to_string().as_bytes(), "config.json")
}

fn refused(edit: impl FnOnce(&mut Value)) -> String {
    let mut value = base();
    edit(&mut value);
    parse(&value).unwrap_err().to_string()
}

#[test]
fn the_published_defaults_fill_what_the_config_leaves_out() {
    let config = parse(&base()).unwrap();
    assert_eq!(
        (
            config.head_dim,
            config.kv_heads,
            config.original_positions_max
        ),
        (8, 2, 4096)
    );
    assert_eq!(config.rope.short_factor, [1.0, 1.5, 2.0, 3.0]);
    assert!(
        (config.rope.magnitude - 1.190_238_0).abs() < 1e-6,
        "{}",
        config.rope.magnitude
    );
    assert!(config.sub_first && !config.tie_word_embeddings);
    let vision = VisionConfig {
        hidden_size: 1024,
        intermediate_size: 4096,
        layers: 24,
        heads: 16,
        layers_run: 23,
    };
    assert_eq!(config.vision, vision);
}

#[test]
fn the_newer_rope_spellings_mean_the_same() {
    let want = parse(&base()).unwrap();
    let mut moved = base();
    let object = moved.as_object_mut().unwrap();
    let mut scaling = object.remove("rope_scaling").unwrap();
    scaling.as_object_mut().unwrap().remove("type");
    scaling["rope_type"] = json!("longrope");
    scaling["original_max_position_embeddings"] =
        object.remove("original_max_position_embeddings").unwrap();
    let mut scaled = moved.clone();
    scaled["rope_scaling"] = scaling.clone();
    assert_eq!(parse(&scaled).unwrap(), want);
    scaling["rope_theta"] = moved.as_object_mut().unwrap().remove("rope_theta").unwrap();
    moved["rope_parameters"] = scaling;
    assert_eq!(parse(&moved).unwrap(), want);
}

#[test]
fn a_model_without_rope_scaling_has_one_plain_regime() {
    let mut value = base();
    value["rope_scaling"] = Value::Null;
    let config = parse(&value).unwrap();
    assert_eq!(config.rope.long_factor, [1.0; 4]);
    assert_eq!(
        (config.rope.magnitude, config.original_positions_max),
        (1.0, 131072)
    );
}

#[test]
fn mlx_tables_are_no_obstacle_and_other_quantizers_are() {
    let mut value = base();
    value["quantization"] = json!({ "group_size": 64, "bits": 4, "mode": "affine", "lm_head": false, "model.x": { "bits": 4 } });
    value["quantization_config"] = value["quantization"].clone();
    value["vision_config"] = json!({ "intermediate_size": 128 });
    assert!(parse(&value).is_ok());
    assert!(
        refused(|v| v["quantization"] = json!({ "mode": "mxfp4" }))
            .contains("quantization.mode holds mxfp4")
    );
    assert!(
        refused(|v| v["quantization_config"] = json!({ "quant_method": "gptq" })).contains("gptq")
    );
}

#[test]
fn end_of_turn_ids_are_one_or_many_and_add_up() {
    let mut config = parse(&base()).unwrap();
    config
        .add_generation_eos(
            br#"{"eos_token_id": [32000, 2, 32007]}"#,
            "generation_config.json",
        )
        .unwrap();
    assert_eq!(config.eos_token_ids, [2, 32000, 32007]);
    assert!(
        config
            .add_generation_eos(br#"{"eos_token_id": ["x"]}"#, "generation_config.json")
            .is_err()
    );
}

#[test]
fn impossible_configs_are_refused_by_key() {
    assert!(refused(|v| v["model_type"] = json!("phi3")).contains("only \"phi3_v\""));
    assert!(refused(|v| v["hidden_size"] = json!(-3)).contains("hidden_size holds -3"));
    assert!(refused(|v| v["hidden_size"] = json!("32")).contains("hidden_size holds \"32\""));
    assert!(
        refused(|v| v["num_attention_heads"] = json!(5)).contains("num_attention_heads holds 5")
    );
    assert!(
        refused(|v| v["num_key_value_heads"] = json!(3)).contains("num_key_value_heads holds 3")
    );
    assert!(refused(|v| v["vocab_size"] = json!(1u64 << 60)).contains("vocab_size"));
    assert!(refused(|v| v["hidden_act"] = json!("gelu")).contains("hidden_act"));
    assert!(refused(|v| v["rope_scaling"]["type"] = json!("yarn")).contains("\"yarn\""));
    assert!(
        refused(|v| v["rope_scaling"]["short_factor"] = json!([1, 2]))
            .contains("short_factor holds 2 entries")
    );
    assert!(
        refused(|v| v["rope_scaling"]["long_factor"] = json!([1, 2, 0, 1])).contains("3 of them")
    );
    assert!(refused(|v| v["original_max_position_embeddings"] = json!(1)).contains("at least 2"));
    assert!(
        refused(|v| v["img_processor"] = json!({ "layer_idx": -99 }))
            .contains("img_processor.layer_idx")
    );
    assert!(refused(|v| v["img_processor"] = json!({ "image_size": 224 })).contains("want 336"));
    assert!(
        refused(|v| v["embd_layer"] = json!({ "use_hd_transform": false }))
            .contains("use_hd_transform")
    );
    let message = ModelConfig::parse(b"{\"a\": ", "config.json")
        .unwrap_err()
        .to_string();
    assert!(message.starts_with("config.json: not JSON"), "{message}");
    assert!(
        ModelConfig::parse(b"[]", "config.json")
            .unwrap_err()
            .to_string()
            .contains("JSON object")
    );
}
