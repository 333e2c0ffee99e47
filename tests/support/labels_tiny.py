"""Saves tiny networks with random weights and their processors, in the files that users have."""

from pathlib import Path

import torch
import transformers as hf

WORDS = ("red", "cup", "fork", "plate", "a", "on", "photo", "of", "the", "##s", "steel", "bowl")
"""Words of Grounding DINO's tokenizer; "##s" is the ending of a word."""


def save_sam2(folder: Path, video: bool = False) -> Path:
    """Save a SAM 2 for images of 64 × 64 pixels.

    With `video` the model also has the memory of earlier frames, as the published SAM 2 has.
    """
    backbone = hf.Sam2HieraDetConfig(
        hidden_size=8, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 2, 2, 2], global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    vision = hf.Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32,
    )  # fmt: skip
    prompt = {"hidden_size": 32, "image_size": 64, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 32,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    }
    common = {"vision_config": vision, "initializer_range": 0.3}
    torch.manual_seed(0)
    if not video:
        config = hf.Sam2Config(
            prompt_encoder_config=hf.Sam2PromptEncoderConfig(**prompt),
            mask_decoder_config=hf.Sam2MaskDecoderConfig(**decoder),
            **common,
        )
        hf.Sam2Model(config).save_pretrained(folder)
        return folder
    video_config = hf.Sam2VideoConfig(
        prompt_encoder_config=prompt, mask_decoder_config=decoder, **common, image_size=64,
        memory_attention_hidden_size=32, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=32, memory_encoder_output_channels=8,
        mask_downsampler_embed_dim=32,
        memory_fuser_embed_dim=32, memory_fuser_num_layers=1, memory_fuser_intermediate_dim=32,
    )  # fmt: skip
    hf.Sam2VideoModel(video_config).save_pretrained(folder)
    return folder


def save_grounding_dino(folder: Path) -> Path:
    """Save a Grounding DINO with ten queries and prompts of at most 16 tokens.

    Special tokens and punctuation have the ids of BERT, because the model's code contains these.
    """
    special_tokens = {
        "[PAD]": 0,
        "[UNK]": 100,
        "[CLS]": 101,
        "[SEP]": 102,
        "[MASK]": 103,
        ".": 1012,
        "?": 1029,
    }
    first_word_id = 1040  # after the ids of all special tokens
    num_ids = 1060  # some more than are used
    unused_ids = [i for i in range(first_word_id) if i not in special_tokens.values()]
    vocabulary = {f"[unused{i}]": i for i in unused_ids} | special_tokens
    vocabulary |= {word: first_word_id + i for i, word in enumerate(WORDS)}
    config = hf.GroundingDinoConfig(
        backbone_config=hf.SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
            out_features=["stage2", "stage3", "stage4"]),
        text_config=hf.BertConfig(
            vocab_size=num_ids, hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=32),
        num_queries=10, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, max_text_len=16,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    processor = hf.GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    hf.GroundingDinoProcessor(processor, hf.BertTokenizer(vocab=vocabulary)).save_pretrained(folder)
    return folder


def save_owlv2(folder: Path) -> Path:
    """Save an OWLv2 for images of 32 × 32 pixels and queries of at most 32 tokens.

    The tokens are letters, letters at the end of a word ("a</w>"), and the word "cup".
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    last_letters = [f"{letter}</w>" for letter in letters]
    tokens = ["!", *letters, *last_letters, "cu", "cup</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = hf.Owlv2Config(
        text_config={
            "vocab_size": len(vocabulary),
            "bos_token_id": vocabulary["<|startoftext|>"],
            "eos_token_id": vocabulary["<|endoftext|>"],
            "max_position_embeddings": 32,
            **tower,
        },
        vision_config={"image_size": 32, "patch_size": 8, **tower},
        projection_dim=16,
    )
    torch.manual_seed(0)
    network = hf.Owlv2ForObjectDetection(config)
    for parameter in network.box_head.parameters():
        parameter.data *= 0.1  # so that predicted boxes stay near their patches of the image
    network.save_pretrained(folder)
    merges = [("c", "u"), ("cu", "p</w>")]
    tokenizer = hf.CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token="!", model_max_length=32
    )
    processor = hf.Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    hf.Owlv2Processor(processor, tokenizer).save_pretrained(folder)
    return folder
