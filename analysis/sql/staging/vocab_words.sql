-- Which word does each vocabulary entry stand for?
-- One row per run and vocabulary entry. word is the text in lower case, without white space and the word-start marks of
-- tokenizers. Special tokens and bytes of incomplete characters keep their case.
create view vocab_words as
with trimmed as (
  select
    run_id,
    token_id,
    category,
    trim(text, '▁ĠĊĉ ' || chr(9) || chr(10) || chr(13)) as word,
    is_special or regexp_matches(text, '<0x[0-9A-F]{2}>') as keeps_case
  from vocab
)
select run_id, token_id, category, coalesce(nullif(if(keeps_case, word, lower(word)), ''), '(blank)') as word
from trimmed;
